"""Measures what checkpoints add to the mean step of a training of 100 M parameters.

    python benchmarks/checkpoint.py benchmarks/records/checkpoint.json

One training, the real loop with all that hangs on it, goes through segments of `--steps` steps: without a checkpoint,
with one that is written beside the training, with one that the training waits for. A segment begins with its save and
ends when that has its name, so it pays for all of it. The three take turns, in every order; what a checkpoint adds is
the difference of a segment to the one without in the same round, and is laid on `--steps-between` steps. Steps are kept
short, which makes the aim harder: the same write falls on less work. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import gib, origin, peak_memory, summary, write
from rich.console import Console
from rich.table import Table
from stages import accelerator, synchronizer
from torch import Tensor
from training_job import NEVER, counted, make_run, opened, run_job

from launcher.recipe import Recipe, load_recipe
from trainer.callback import Callback
from trainer.checkpoint_folder import read
from trainer.training import Training

LIBRARIES = ("torch", "deepspeed", "safetensors", "numpy")
STAGE = "coarse"
NONE, ASYNC, SYNC = KINDS = ("none", "async", "sync")
WARM_UP = (ASYNC, SYNC)
"""Segments before those that count: later saves use the memory of the first again, and remove what is too old."""
AIM = 0.05
"""Share of the mean step that asynchronous checkpoints add at most."""
CLIPS = 512
PLAIN_WRITES = 3
BLOCK_BYTES = 16 << 20


class Segments(Callback):
    """Goes through segments of `steps` steps, the first of which are without a checkpoint, then one of each of
    `kinds`, and times them."""

    def __init__(self, steps: int, kinds: list[str], rank: int) -> None:
        self.steps = steps
        self.kinds = kinds
        self.console = Console(width=120, quiet=rank > 0)
        self.segments: list[dict[str, Any]] = []
        self._started = 0.0
        self._stall = 0.0
        self._named: float | None = None

    def on_start(self, training: Training) -> None:
        self._let(training, NONE)

    def after_step(self, training: Training, losses: Tensor) -> None:
        number, rest = divmod(training.step, self.steps)
        if rest:
            return
        training.checkpoints.finish()  # a write that is still under way belongs to the segment that ends
        synchronizer(training.engine.device.type)()
        now = time.perf_counter()
        if 2 <= number <= len(self.kinds) + 1:
            self._end(self.kinds[number - 2], now, training.checkpoints.stall)
        self._started, self._stall, self._named = now, training.checkpoints.stall, None
        # Whether this step ends with a save is decided after the callbacks.
        self._let(training, self.kinds[number - 1] if number <= len(self.kinds) else NONE)

    def _end(self, kind: str, now: float, stall: float) -> None:
        seconds = now - self._started
        self.segments.append(
            {"kind": kind, "seconds": seconds, "stall": stall - self._stall, "named": self._named or seconds}
        )
        self.console.print(f"segment {len(self.segments)}: {kind} {seconds:.2f} s", highlight=False)

    def _let(self, training: Training, kind: str) -> None:
        """The next steps save as `kind` says."""
        every = NEVER if kind == NONE else self.steps
        changed = {"checkpoint_every": every, "checkpoint_async": kind == ASYNC}
        training.config = training.config.model_copy(update=changed)

    def on_checkpoint(self, training: Training, step: int) -> None:
        self._named = time.perf_counter() - self._started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=20, help="of a segment")
    parser.add_argument("--rounds", type=int, default=12, help="segments of each kind")
    parser.add_argument("--steps-between", type=int, default=100, help="what is added is laid on so many steps")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4, help="of a second each, in a step of all ranks")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary one when not given")
    parser.add_argument("--small", action="store_true", help="a tiny stage, few steps: to see that this works")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.steps, arguments.rounds = 4, 1
    console = Console(width=120)
    orders = itertools.islice(itertools.cycle(itertools.permutations(KINDS)), arguments.rounds)
    kinds = [*WARM_UP, *itertools.chain.from_iterable(orders)]
    recipe = recipe_of(arguments, (len(kinds) + 1) * arguments.steps)
    record = origin(LIBRARIES)
    record["machine"]["accelerator"] = accelerator("cuda" if torch.cuda.is_available() else "cpu")
    record["settings"] = {name: value for name, value in vars(arguments).items() if name not in ("record", "folder")}
    count, stage = counted(recipe, STAGE), recipe.stages.coarse
    record |= {
        "parameters": count.parameters,
        "step": {"windows": arguments.windows, "positions": arguments.windows * count.positions},
        "stage": stage.model_dump(mode="json"),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = Path(folder) / "run"
        make_run(run, recipe, STAGE, CLIPS)
        found = run_job(train, arguments.ranks, run, arguments.steps, kinds)
        plain = [plain_write(Path(folder) / "plain", found["bytes"]) for _ in range(PLAIN_WRITES)]
    segments = found["segments"][len(WARM_UP) :]
    results = {kind: of_kind(kind, segments, arguments.steps) for kind in KINDS}
    record |= {
        "checkpoint_bytes": found["bytes"],
        "plain_write_and_fsync": summary(plain) | {"bytes_per_second": round(found["bytes"] / median(plain))},
        "order": kinds,
        "results": results,
        "added": [added(kind, segments, results, arguments.steps_between) for kind in (ASYNC, SYNC)],
        "peak_memory_gib": gib(found["peak_memory"]),
    }
    console.print(result_table(record))
    if arguments.record:
        write(arguments.record, record)


def recipe_of(arguments: argparse.Namespace, steps: int) -> Recipe:
    """The coarse stage of the quickstart, widened to 100 M parameters and on short windows."""
    shape = "{dim: 64, layers: 2, heads: 1}" if arguments.small else "{dim: 1024, layers: 8, heads: 8}"
    train = {
        "ranks": arguments.ranks,
        "global_batch": arguments.windows,
        "learning_rate": 1e-4,
        "steps": steps + 1,  # the last one saves and validates whatever the recipe says
        "warmup_steps": 10,
        "validate_every": NEVER,
        "checkpoint_every": arguments.steps,
    }
    overrides = [f"stages.{STAGE}.train.{name}={value}" for name, value in train.items()]
    model = [f"stages.{STAGE}.model.transformer={shape}", f"stages.{STAGE}.model.window_seconds=1.0"]
    return load_recipe("quickstart", [*overrides, *model])


def train(run: Path, steps: int, kinds: list[str]) -> dict[str, Any]:
    """One rank's job."""
    with opened(run, STAGE) as training:
        segments = Segments(steps, kinds, training.engine.rank)
        training.callbacks.append(segments)
        training.run()
        files = read(training.checkpoints.path(training.step)).manifest["files"]
    size = sum(file["bytes"] for file in files.values())
    return {"segments": segments.segments, "bytes": size, "peak_memory": peak_memory()}


def plain_write(path: Path, size: int) -> float:
    """Seconds to write `size` bytes and to bring them to the disk."""
    block = os.urandom(BLOCK_BYTES)
    started = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def of_kind(kind: str, segments: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Mean seconds of a step in each segment of a kind; and of each checkpoint, how long the training stood still for
    it, and how long it was under way."""
    own = [segment for segment in segments if segment["kind"] == kind]
    result = summary([segment["seconds"] / steps for segment in own])
    if kind != NONE:
        result["stall"] = summary([segment["stall"] for segment in own])
        result["until_named"] = summary([segment["named"] for segment in own])
    return result


def added(kind: str, segments: list[dict[str, Any]], results: dict[str, Any], steps_between: int) -> dict[str, Any]:
    """The seconds that each checkpoint of a kind added, and as a share of the steps from one to the next."""
    rounds = [
        {segment["kind"]: segment["seconds"] for segment in segments[first : first + len(KINDS)]}
        for first in range(0, len(segments), len(KINDS))
    ]
    seconds = [one[kind] - one[NONE] for one in rounds]
    without = steps_between * results[NONE]["median"]
    return {
        "name": kind,
        "seconds": [round(value, 3) for value in seconds],
        "of_median": round(median(seconds) / without, 4),
        "of_mean": round(mean(seconds) / without, 4),
        "aim": AIM if kind == ASYNC else None,
    }


def result_table(record: dict[str, Any]) -> Table:
    plain, size = record["plain_write_and_fsync"], record["checkpoint_bytes"]
    table = Table(
        title=f"Checkpoints of {record['parameters'] / 1e6:.1f} M parameters, {size / 1e9:.2f} GB each, every "
        f"{record['settings']['steps_between']} steps",
        caption=f"a plain write and fsync of as many bytes: {plain['median']:.2f} s",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for heading in (
        "best s/step",
        "median s/step",
        "stall s",
        "until named s",
        "added s",
        "share",
        "of mean",
        "aim",
        "",
    ):
        table.add_column(heading, justify="right")
    shares = {row["name"]: row for row in record["added"]}
    for kind, result in record["results"].items():
        cells = [kind, f"{result['best']:.4f}", f"{result['median']:.4f}"]
        if kind in shares:
            row = shares[kind]
            cells += [f"{result['stall']['median']:.2f}", f"{result['until_named']['median']:.2f}"]
            cells += [f"{median(row['seconds']):.2f}", f"{row['of_median']:.1%}", f"{row['of_mean']:.1%}"]
            if row["aim"] is not None:
                cells += [f"{row['aim']:.0%}", "met" if row["of_median"] <= row["aim"] else "not met"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
