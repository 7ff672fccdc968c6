"""The training section of `gpu.py`: steps a second, MFU and memory of ours and of Llama."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, get_args

import torch
from common import gib, ratio_table, ratios, summary
from gpu_session import DTYPE, FLAT, Session, Size, failure_kept, release
from llama import new_llama, random_text
from llama import training_flops as llama_flops
from rich.table import Table
from stages import DTYPES, random_codes, synchronizer
from torch import Tensor, nn
from train_speed import counted, parameters

from launcher.recipe import Recipe
from model.attention import choose
from model.config import AttentionName, ExecutionConfig
from model.errors import UserError

MFU = "FLOPs of a window's training step (3 × forward, no recomputation) × windows a second / peak"
LLAMA, LLAMA_COMPILED = "Llama", "Llama, compiled"
LLAMA_AIM = 1.3
"""Times faster than Llama as it comes, not compiled."""


@dataclass(frozen=True)
class Contestant:
    name: str
    loss_of: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    prepare: Callable[[], object]
    """Called before every turn: torch's flash kernel is switched for the whole process."""
    facts: dict[str, Any]
    """What the record says of it; `flops` are those of one window's training step."""
    before: int
    """Bytes on the device before its model was made."""


def train(session: Session, name: str, size: Size) -> None:
    """One size: every attention backend that works, compiled and not, and Llama, compiled and not."""
    torch._dynamo.reset()  # what was compiled for another size counts towards a limit
    recipe, batch = size.recipe(), session.arguments.batch or size.batch
    positions = counted(recipe, FLAT).positions
    backends, notes = attention_backends(session, size.head_dim)
    entry = session.header() | {"batch": batch, "positions": positions, "attention": notes}
    entry |= {
        "not_made": {},
        "mfu": MFU,
        "mfu_aim": size.mfu_aim,
        "stage": recipe.stages.coarse.model.model_dump(mode="json"),
    }
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}

    def keep() -> None:
        for one, timings in seconds.items():
            results[one] |= speed(summary(timings), results[one]["flops"], batch, positions, session.peak)
        session.save("train", name, entry | {"results": results, "ratios": compared(results)})

    groups = {"ours": ours(session, recipe, backends, batch), LLAMA: llamas(session, recipe, batch)}
    contestants: list[Contestant] = []
    for group, members in groups.items():
        making: dict[str, Any] = {}
        with failure_kept(making):
            for one in members:
                if session.time_is_up():
                    break
                results[one.name] = one.facts | warm_up(session, one)
                contestants.append(one)
                keep()
        entry["not_made"] |= {group: making["failed"]} if making else {}
    for number in range(session.arguments.rounds):
        session.say(f"round {number + 1} of {session.arguments.rounds}, {name}")
        for one in contestants:
            if "failed" not in results[one.name] and not session.time_is_up():
                results[one.name] |= turn(session, one, seconds)
                keep()
    show(session, name, entry | {"results": results, "ratios": compared(results)})


def attention_backends(session: Session, head_dim: int) -> tuple[list[AttentionName], dict[str, str]]:
    """The backends that work here but for `math`, the definition; and what the record says of each."""
    where, dtype = torch.device(session.device), DTYPES[DTYPE]
    notes = {"auto": choose("auto", where, dtype, head_dim)[0]}
    works: list[AttentionName] = []
    for name in get_args(AttentionName):
        if name in ("auto", "math"):
            continue
        try:
            choose(name, where, dtype, head_dim)
        except UserError as error:
            notes[name] = str(error)
        else:
            works.append(name)
    return works, notes


def ours(session: Session, recipe: Recipe, backends: list[AttentionName], batch: int) -> Iterator[Contestant]:
    """One for each backend, as it comes, with Liger's kernels where they are installed, and compiled.

    They are twins that share their parameters.
    """
    before = allocated(session)
    codes = random_codes(recipe, recipe.stages.coarse.model.window_seconds, batch, session.device)
    shape = recipe.stages.coarse.model.transformer
    head_dim = shape.dim // shape.heads
    first = session.new_stage(recipe, ExecutionConfig(compile="off"))
    optimizer = fused_adamw(session, first)
    facts = facts_of(first, optimizer, counted(recipe, FLAT).training_flops)
    variants = {"": ExecutionConfig(compile="off", kernels="torch"), ", compiled": ExecutionConfig(compile="on")}
    if session.on_gpu and find_spec("liger_kernel"):
        variants[", Liger"] = ExecutionConfig(compile="off", kernels="liger")
    for suffix, variant in variants.items():
        for backend in backends:
            twin = session.new_stage(recipe, variant.model_copy(update={"attention": backend}))
            twin.load_state_dict(first.state_dict(keep_vars=True), assign=True)
            prepare = partial(choose, backend, torch.device(session.device), DTYPES[DTYPE], head_dim)
            yield Contestant(backend + suffix, lambda twin=twin: twin(codes).mean(), optimizer, prepare, facts, before)


def llamas(session: Session, recipe: Recipe, batch: int) -> Iterator[Contestant]:
    """As it comes, and compiled, with the same parameters."""
    before, count = allocated(session), counted(recipe, FLAT)
    model = new_llama(recipe, count, DTYPE, session.device)
    ids, labels = random_text(model, count, batch, session.device)
    optimizer = fused_adamw(session, model)
    facts = facts_of(model, optimizer, llama_flops(recipe, model, count))
    prepare = partial(choose, "sdpa", torch.device(session.device), DTYPES[DTYPE], model.config.head_dim)
    for name, run in ((LLAMA, model), (LLAMA_COMPILED, torch.compile(model))):

        def loss_of(run: nn.Module = run) -> Tensor:
            return run(input_ids=ids, labels=labels, use_cache=False).loss

        yield Contestant(name, loss_of, optimizer, prepare, facts, before)


def facts_of(model: nn.Module, optimizer: torch.optim.Optimizer, flops: int) -> dict[str, Any]:
    kind = type(optimizer)
    return {"parameters": parameters(model), "optimizer": f"{kind.__module__}.{kind.__name__}", "flops": flops}


def fused_adamw(session: Session, model: nn.Module) -> torch.optim.Optimizer:
    """The one that training takes where DeepSpeed is installed, else torch's."""
    if session.on_gpu and find_spec("deepspeed"):
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(model.parameters(), lr=1e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def allocated(session: Session) -> int:
    release()
    return torch.cuda.memory_allocated() if session.on_gpu else 0


def warm_up(session: Session, one: Contestant) -> dict[str, Any]:
    """Two steps, which compile and allocate; returns what they say for the record."""
    said: dict[str, Any] = {}
    release()
    if session.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    with failure_kept(said):
        one.prepare()
        steps(one, 2)
        synchronizer(session.device)()
        if session.on_gpu:
            said["peak_memory_gib"] = gib(torch.cuda.max_memory_allocated() - one.before)
    said["warm_up_seconds"] = round(time.monotonic() - started, 1)
    session.say(f"warm-up: {one.name} {said}")
    return said


def turn(session: Session, one: Contestant, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Adds seconds a step, of several in a row: as in training, the device is not waited for in between.

    Returns what is said for the record of a turn that failed.
    """
    synchronize, number = synchronizer(session.device), session.arguments.steps
    said: dict[str, Any] = {}
    with failure_kept(said):
        one.prepare()
        steps(one, 1)
        synchronize()
        started = time.perf_counter()
        loss = steps(one, number)
        synchronize()
        seconds.setdefault(one.name, []).append((time.perf_counter() - started) / number)
        session.say(f"{one.name} {seconds[one.name][-1]:.4f} s a step")
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of {one.name} is {loss.item()}")
    if said:
        release()
    return said


def steps(one: Contestant, number: int) -> Tensor:
    """Trains and returns the last loss."""
    one.optimizer.zero_grad()  # a step that failed may have left some
    for _ in range(number):
        loss = one.loss_of()
        loss.backward()
        one.optimizer.step()
        one.optimizer.zero_grad()
    return loss.detach()


def speed(timing: dict[str, Any], flops: int, batch: int, positions: int, peak: float | None) -> dict[str, Any]:
    """Positions are all that the transformer sees: what is called the tokens of a language model."""
    made = {**timing, "positions_per_second": round(batch * positions / timing["median"])}
    made["tflops_per_second"] = round(batch * flops / timing["median"] / 1e12, 3)
    if peak:
        made["mfu"], made["mfu_best"] = (round(batch * flops / timing[key] / peak, 4) for key in ("median", "best"))
    return made


def compared(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Our fastest beside Llama, of those that were timed."""
    timed = {name: result for name, result in results.items() if "median" in result}
    own = [name for name in timed if name not in (LLAMA, LLAMA_COMPILED)]
    if not own:
        return []
    fastest = min(own, key=lambda name: timed[name]["median"])
    return ratios([(fastest, LLAMA, LLAMA_AIM), (fastest, LLAMA_COMPILED, None)], timed)


def show(session: Session, name: str, entry: dict[str, Any]) -> None:
    aim = f"; aim {entry['mfu_aim']:.0%} MFU" if entry["mfu_aim"] else ""
    title = f"Training {name}: batch {entry['batch']} × {entry['positions']:,} positions{aim}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("parameters", "best s", "median s", "positions/s", "TFLOP/s", "MFU", "peak GiB"):
        table.add_column(heading, justify="right")
    for one, result in entry["results"].items():
        cells = [f"{result['parameters'] / 1e6:.0f} M", *[""] * 5]
        if "median" in result:
            cells[1:4] = f"{result['best']:.4f}", f"{result['median']:.4f}", f"{result['positions_per_second']:,}"
            cells[4] = f"{result['tflops_per_second']:.2f}"
            cells[5] = f"{result['mfu']:.1%}" if "mfu" in result else ""
        memory = f"{result['peak_memory_gib']:.1f}" if "peak_memory_gib" in result else ""
        table.add_row(one, *cells, memory)
    session.console.print(table, ratio_table(entry["ratios"]))
    failed = {one: result["failed"] for one, result in entry["results"].items() if "failed" in result}
    for one, reason in (entry["not_made"] | failed).items():
        session.say(f"{one}: {reason}")
    for note in entry["attention"].values():
        if note not in get_args(AttentionName):
            session.say(note)
    session.say(f"MFU = {entry['mfu']}")
