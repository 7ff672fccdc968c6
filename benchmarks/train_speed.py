"""Times a training step of the coarse stage of `musiclm_small` beside Llama in transformers and audiolm-pytorch.

    python benchmarks/train_speed.py benchmarks/records/train_speed.json --audiolm PEER/bin/python

A step is forward, backward and AdamW over one batch. All take one step each in turn, round after round, so that what
else the machine does falls on all of them. PEER is the environment that README.md says how to make.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import gib, origin, peak_memory, ratio_table, ratios, summary, write
from llama import new_llama, random_text
from peers import AudioLM
from rich.console import Console
from rich.table import Table
from stages import SMALL, VARIANTS, Variant, accelerator, new_stage, random_codes, synchronizer
from torch import Tensor, nn

from launcher.recipe import Recipe, load_recipe
from model.config import ExecutionConfig
from model.counting import StageCount, count_stage, token_fields
from model.fields import CONDITIONING

LIBRARIES = ("torch", "transformers", "numpy")
DTYPE = "bf16"
"""Of the parameters of ours and of Llama."""
LLAMA, LLAMA_COMPILED = "Llama", "Llama, compiled"
AUDIOLM, AUDIOLM_BF16, AUDIOLM_FLASH = "audiolm fp32", "audiolm bf16 autocast", "audiolm bf16 autocast, flash_attn"
EAGER = "flat, not compiled"
RATIOS: tuple[tuple[str, str, float | None], ...] = (
    ("flat", LLAMA, 1.3),
    (EAGER, LLAMA, 1.3),
    ("flat", LLAMA_COMPILED, None),
    ("flat", AUDIOLM, 6),
    ("flat", AUDIOLM_BF16, 3),
    ("flat", AUDIOLM_FLASH, None),
    ("delay", "flat", 2),
    ("delay, aligned conditions", "flat", 3),
    ("flat, aligned conditions", "flat", None),
)
"""How many times faster the first is than the second, and what is aimed for."""
PAUSE = 0.3
"""Seconds between two contestants: threads of the one before stop spinning."""


@dataclass(frozen=True)
class Contestant:
    name: str
    positions: int
    """Length of the sequence its transformer sees."""
    parameters: int
    step: Callable[[], float]
    """Trains on one batch and returns the seconds it took."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--audiolm", metavar="PYTHON", help="interpreter of audiolm-pytorch's environment")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile ours, and let a compiled Llama take part")
    parser.add_argument("--small", action="store_true", help="tiny models: to see that this works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    recipe = load_recipe("musiclm_small", SMALL if arguments.small else ())
    record = origin(LIBRARIES, arguments.audiolm)
    record["machine"]["accelerator"] = accelerator(arguments.device)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("record", "audiolm")}
    record["settings"] = settings | {"dtype": DTYPE, "stage": recipe.stages.coarse.model.model_dump(mode="json")}

    contestants = [ours(variant.name, variant, recipe, arguments, arguments.compile) for variant in VARIANTS]
    contestants += [ours(EAGER, Variant("flat"), recipe, arguments, compiled=False)] if arguments.compile else []
    contestants += [llama(name, recipe, arguments) for name in (LLAMA, LLAMA_COMPILED)[: 1 + arguments.compile]]
    peer = AudioLM(arguments.audiolm, recipe, arguments.device, arguments.threads) if arguments.audiolm else None
    if peer:
        record["versions_audiolm"] = peer.versions
        contestants += audiolm(peer, arguments.batch)
    seconds = compete(contestants, arguments.rounds, console)

    audio = arguments.batch * recipe.stages.coarse.model.window_seconds
    results: dict[str, dict[str, Any]] = {}
    for one in contestants:
        timing = summary(seconds[one.name])
        results[one.name] = {
            "positions": one.positions,
            "parameters": one.parameters,
            "audio_seconds_per_second": round(audio / timing["median"], 3),
            "positions_per_second": round(arguments.batch * one.positions / timing["median"], 1),
            **timing,
        }
    record |= {"results": results, "ratios": ratios(RATIOS, results), "peak_memory_gib": {"ours": gib(peak_memory())}}
    if peer:
        record["peak_memory_gib"]["audiolm"] = gib(peer.peak_memory())
        peer.close()
    console.print(result_table(results), ratio_table(record["ratios"]))
    if arguments.record:
        write(arguments.record, record)


def compete(contestants: list[Contestant], rounds: int, console: Console) -> dict[str, list[float]]:
    """Seconds of every step; a first one of each, which allocates and compiles, is not counted."""
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    for number in range(rounds + 1):
        for one in contestants:
            time.sleep(PAUSE)
            taken = one.step()
            console.print(f"{f'round {number}' if number else 'warm-up'}: {one.name} {taken:.3f} s", highlight=False)
            if number:
                seconds[one.name].append(taken)
    return seconds


def ours(name: str, variant: Variant, recipe: Recipe, arguments: argparse.Namespace, compiled: bool) -> Contestant:
    execution = ExecutionConfig(compile="on" if compiled else "off")
    stage = new_stage(recipe, "coarse", variant, DTYPE, arguments.device, execution)
    batch = random_codes(recipe, stage.config.window_seconds, arguments.batch, arguments.device)
    step = training_step(stage, lambda: stage(batch).mean(), arguments.device)
    return Contestant(name, counted(recipe, variant).positions, parameters(stage), step)


def llama(name: str, recipe: Recipe, arguments: argparse.Namespace) -> Contestant:
    count = counted(recipe, Variant("flat"))
    model = new_llama(recipe, count, DTYPE, arguments.device)
    if name == LLAMA_COMPILED:
        model.compile()
    ids, labels = random_text(model, count, arguments.batch, arguments.device)
    step = training_step(model, lambda: model(input_ids=ids, labels=labels, use_cache=False).loss, arguments.device)
    return Contestant(name, count.positions, parameters(model), step)


def audiolm(peer: AudioLM, batch: int) -> list[Contestant]:
    """As it ships, in fp32 and under autocast, and with `flash_attn`, its fastest, which has no positions at all."""
    sizes = {"default": peer.build("default"), "flash_attn": peer.build("flash_attn", flash_attn=True)}
    return [
        Contestant(name, peer.positions, sizes[model], partial(peer.train, model, precision, batch))
        for name, model, precision in (
            (AUDIOLM, "default", "fp32"),
            (AUDIOLM_BF16, "default", "bf16 autocast"),
            (AUDIOLM_FLASH, "flash_attn", "bf16 autocast"),
        )
    ]


def training_step(model: nn.Module, loss_of: Callable[[], Tensor], device: str) -> Callable[[], float]:
    """Forward, backward and AdamW; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    synchronize = synchronizer(device)

    def step() -> float:
        synchronize()
        started = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds = time.perf_counter() - started
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        return seconds

    return step


def counted(recipe: Recipe, variant: Variant) -> StageCount:
    fields = token_fields(recipe.encoders, recipe.quantizers)
    return count_stage(variant.of(recipe.stages.coarse.model), fields, {CONDITIONING: recipe.encoders.joint.dim})


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Training the coarse stage: one step", title_justify="left")
    table.add_column("")
    for heading in ("parameters", "positions", "best s", "median s", "audio s/s", "positions/s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['parameters'] / 1e6:.1f} M",
            f"{result['positions']:,}",
            f"{result['best']:.3f}",
            f"{result['median']:.3f}",
            f"{result['audio_seconds_per_second']:.2f}",
            f"{result['positions_per_second']:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()
