"""Times sampling with `musiclm_small`: each stage alone beside audiolm-pytorch, and a whole clip through all three.

    python benchmarks/generate_speed.py benchmarks/records/generate_speed.json --audiolm PEER/bin/python

Weights and contexts are random; windows, their overlap, guidance and temperatures are the recipe's. A stage alone makes
the first `--seconds` of one window after the window's whole context, all in turn, round after round; nothing is
extrapolated from that. A clip is made whole and ends with the codes: the codec is not timed. PEER is the environment
that README.md says how to make.
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
from peers import AudioLM
from rich.console import Console
from rich.table import Table
from stages import DTYPES, SMALL, Variant, accelerator, new_stage, random_codes, synchronizer
from torch import Tensor

from launcher.recipe import Recipe, load_recipe
from model.config import STAGES, ExecutionConfig, StageName
from model.counting import prefix_positions, token_fields
from model.fields import CONDITIONING
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer

LIBRARIES = ("torch", "numpy")
FLAT, DELAY, ALIGNED = Variant("flat"), Variant("delay"), Variant("delay", aligned=True)
CLIP_SECONDS = 10.0
CLIP_AIMS = {FLAT: 90.0, DELAY: 30.0}
"""Seconds for one clip in bf16, at most."""
AUDIOLM_AIM = 2.0
AUDIOLM_PRECISIONS = ("fp32", "bf16 autocast")
WARM_UP_STEPS = 6
PAUSE = 0.3
"""Seconds between two contestants: threads of the one before stop spinning."""


@dataclass(frozen=True)
class Contestant:
    name: str
    facts: dict[str, Any]
    """What the record says of it."""
    codes: int
    run: Callable[[], float]
    """Makes them and returns the seconds it took."""
    warm_up: Callable[[], object] = lambda: None


class EnoughSteps(Exception):
    """Ends the sampling of a window early."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--audiolm", metavar="PYTHON", help="interpreter of audiolm-pytorch's environment")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of our parameters")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="of music that a stage alone makes")
    parser.add_argument("--rounds", type=int, default=3, help="of the stages alone")
    parser.add_argument("--clip-batch", nargs="*", type=int, default=[1], help="clips made at once; none: no clips")
    parser.add_argument("--clip-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny models: to see that this works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    recipe = load_recipe("musiclm_small", SMALL if arguments.small else ())
    record = origin(LIBRARIES, arguments.audiolm)
    record["machine"]["accelerator"] = accelerator(arguments.device)
    record["settings"] = {name: value for name, value in vars(arguments).items() if name not in ("record", "audiolm")}
    peer = AudioLM(arguments.audiolm, recipe, arguments.device, arguments.threads) if arguments.audiolm else None
    if peer:
        record["versions_audiolm"] = peer.versions
        peer.build("default")

    models = {
        (dtype, variant): {name: eval_stage(recipe, name, variant, dtype, arguments.device) for name in STAGES}
        for dtype in arguments.dtype
        for variant in (FLAT, DELAY, ALIGNED)
    }
    alone: dict[str, dict[str, Any]] = {}
    for batch in arguments.batch:
        contestants = [
            stage_alone(recipe, name, stages[name], variant, dtype, batch, guided, arguments)
            for (dtype, variant), stages in models.items()
            for name in STAGES
            for guided in (True, False)
            if worth_timing(recipe, name, variant, guided)
        ]
        contestants += audiolm(peer, recipe, batch, arguments.seconds) if peer else []
        alone |= compete(contestants, arguments.rounds, console)
    clips: dict[str, dict[str, Any]] = {}
    for batch in arguments.clip_batch:
        contestants = [
            clip(recipe, stages, variant, dtype, batch, arguments.device) for (dtype, variant), stages in models.items()
        ]
        clips |= compete(contestants, arguments.clip_rounds, console)

    # Every one of these makes codes of the coarse stage, but a delayed window a few less: what is compared is a code.
    per_code = {
        name: {key: result[key] / result["codes"] for key in ("best", "median")} for name, result in alone.items()
    }
    wanted = [
        (alone_name("coarse", variant, dtype, batch, False), audiolm_name(precision, batch), AUDIOLM_AIM)
        for batch in arguments.batch
        for dtype in arguments.dtype
        for variant in (FLAT, DELAY)
        for precision in AUDIOLM_PRECISIONS
    ]
    record |= {
        "alone": alone,
        "ratios_per_code": ratios(wanted, per_code),
        "clips": clips,
        "peak_memory_gib": {"ours": gib(peak_memory())},
    }
    if peer:
        record["peak_memory_gib"]["audiolm"] = gib(peer.peak_memory())
        peer.close()
    console.print(alone_table(alone), ratio_table(record["ratios_per_code"]), clip_table(clips))
    if arguments.record:
        write(arguments.record, record)


def compete(contestants: list[Contestant], rounds: int, console: Console) -> dict[str, dict[str, Any]]:
    """What each took, by name: one after another, round after round."""
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    for one in contestants:
        one.warm_up()
    for number in range(rounds):
        for one in contestants:
            time.sleep(PAUSE)
            seconds[one.name].append(one.run())
            console.print(f"round {number + 1}: {one.name} {seconds[one.name][-1]:.2f} s", highlight=False)
    results = {}
    for one in contestants:
        timing = summary(seconds[one.name])
        rate = round(one.codes / timing["median"], 2)
        results[one.name] = {**one.facts, "codes": one.codes, "codes_per_second": rate, **timing}
    return results


def eval_stage(recipe: Recipe, name: StageName, variant: Variant, dtype: str, device: str) -> StageTransformer:
    return new_stage(recipe, name, variant, dtype, device, ExecutionConfig()).eval()


def worth_timing(recipe: Recipe, name: StageName, variant: Variant, guided: bool) -> bool:
    """Without guidance the coarse stage alone, since audiolm-pytorch's has none; one quantizer has nothing to delay."""
    if name == "semantic" and variant == DELAY:
        return False
    return guided or (name == "coarse" and sampler(recipe, name).cfg != 1)


def stage_alone(
    recipe: Recipe,
    name: StageName,
    stage: StageTransformer,
    variant: Variant,
    dtype: str,
    batch: int,
    guided: bool,
    arguments: argparse.Namespace,
) -> Contestant:
    """The first steps of one window, as many as give `--seconds` of music."""
    window = stage.config.window_seconds
    pattern = stage.pattern(stage.target.frames(window))
    steps = min(stage.target.frames(arguments.seconds) * pattern.stride, pattern.steps)
    chosen = sampler(recipe, name, guided)
    make = partial(first_steps, stage, random_codes(recipe, window, batch, arguments.device), chosen)
    facts = {
        "stage": name,
        "variant": variant.name,
        "dtype": dtype,
        "batch": batch,
        "cfg": chosen.cfg,
        "prefix": prefix_positions(stage.config, stage.fields),
        "steps": steps,
        "window_steps": pattern.steps,
    }
    return Contestant(
        alone_name(name, variant, dtype, batch, guided),
        facts,
        batch * sum(1 for step in range(steps) for _ in pattern.codes_at(step)),
        partial(make, steps),
        partial(make, WARM_UP_STEPS),
    )


def first_steps(stage: StageTransformer, context: dict[str, Tensor], chosen: Sampler, steps: int) -> float:
    """Seconds that the first `steps` steps of a window take, the pass over its context included."""
    batch, device = next(iter(context.values())).shape[0], stage.embedding.weight.device

    def stop(done: int, total: int) -> None:
        if done >= steps:
            raise EnoughSteps

    started = clock(device)
    try:
        generate_stage(stage, context, stage.config.window_seconds, chosen, list(range(batch)), on_step=stop)
    except EnoughSteps:
        return clock(device) - started
    raise AssertionError("a window ended before its last step was reported")


def audiolm(peer: AudioLM, recipe: Recipe, batch: int, seconds: float) -> list[Contestant]:
    """Its sampling with the cache that is its default; without a text condition it has no guidance."""
    frames = min(token_fields(recipe.encoders, recipe.quantizers)["acoustic"].frames(seconds), peer.frames)
    codes = batch * frames * peer.shape["quantizers"]
    facts = {"stage": "coarse", "batch": batch, "cfg": 1.0, "prefix": peer.count.prefix, "steps": codes // batch}
    return [
        Contestant(
            audiolm_name(precision, batch),
            {**facts, "precision": precision},
            codes,
            partial(peer.generate, "default", precision, batch, frames),
            partial(peer.generate, "default", precision, batch, WARM_UP_STEPS // peer.shape["quantizers"]),
        )
        for precision in AUDIOLM_PRECISIONS
    ]


def clip(
    recipe: Recipe, stages: dict[StageName, StageTransformer], variant: Variant, dtype: str, batch: int, device: str
) -> Contestant:
    """A whole clip through all three stages, as MusicPipeline makes it between the embedder and the codec."""

    def run() -> float:
        rows = random_codes(recipe, CLIP_SECONDS, batch, device)[CONDITIONING]
        started = clock(rows.device)
        codes = {CONDITIONING: rows}
        for index, (name, stage) in enumerate(stages.items()):
            target = stage.target
            shape = (batch, target.frames(CLIP_SECONDS), target.quantizers)
            whole = codes.setdefault(target.name, torch.zeros(shape, dtype=torch.long, device=rows.device))
            seeds = [row * len(stages) + index for row in range(batch)]
            made = generate_stage(stage, codes, CLIP_SECONDS, sampler(recipe, name), seeds)
            whole[..., stage.quantizers.start : stage.quantizers.stop] = made
        return clock(rows.device) - started

    codes = sum(stage.target.frames(CLIP_SECONDS) * len(stage.quantizers) for stage in stages.values())
    facts = {"variant": variant.name, "dtype": dtype, "batch": batch, "clip_seconds": CLIP_SECONDS}
    if batch == 1 and dtype == "bf16":
        facts["aim_seconds"] = CLIP_AIMS.get(variant)
    return Contestant(f"clip, {variant.name}, {dtype}, batch {batch}", facts, batch * codes, run)


def sampler(recipe: Recipe, name: StageName, guided: bool = True) -> Sampler:
    """The recipe's, as MusicPipeline makes it, or the same without guidance."""
    own = recipe.sampling
    cfg = own.cfg.get(name, 1.0) if guided else 1.0
    return Sampler(temperature=own.temperature.get(name, 1.0), top_k=own.top_k.get(name), cfg=cfg)


def alone_name(name: StageName, variant: Variant, dtype: str, batch: int, guided: bool) -> str:
    return f"{name}, {variant.name}, {dtype}, batch {batch}{'' if guided else ', unguided'}"


def audiolm_name(precision: str, batch: int) -> str:
    return f"audiolm coarse, {precision}, batch {batch}"


def clock(device: torch.device) -> float:
    """Now, once the device has done what it was told."""
    synchronizer(str(device))()
    return time.perf_counter()


def alone_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="A stage alone, from the start of a window", title_justify="left")
    table.add_column("")
    for heading in ("steps", "codes", "best s", "median s", "codes/s", "ms a step"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        steps, step = result["steps"], 1000 * result["median"] / result["steps"]
        timing = f"{result['best']:.2f}", f"{result['median']:.2f}"
        table.add_row(
            name, f"{steps:,}", f"{result['codes']:,}", *timing, f"{result['codes_per_second']:.1f}", f"{step:.1f}"
        )
    return table


def clip_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"A clip of {CLIP_SECONDS:g} s through all three stages", title_justify="left")
    table.add_column("")
    for heading in ("codes", "best s", "median s", "codes/s", "aim s", ""):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        aim = result.get("aim_seconds")
        met = "" if aim is None else "met" if result["median"] <= aim else "not met"
        timing = f"{result['best']:.1f}", f"{result['median']:.1f}", f"{result['codes_per_second']:.1f}"
        table.add_row(name, f"{result['codes']:,}", *timing, "" if aim is None else f"{aim:g}", met)
    return table


if __name__ == "__main__":
    main()
