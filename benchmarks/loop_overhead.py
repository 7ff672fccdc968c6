"""Times steps of the training loop, with all that hangs on it, beside a bare DeepSpeed loop on the same stage.

    python benchmarks/loop_overhead.py benchmarks/records/loop_overhead.json

Ours is what `stretto train` runs on each rank: batches from token shards (in the page cache) through the loader,
metrics every 10 steps, spike guard, heartbeat, watchdog, callbacks. Validations and checkpoints lie outside of what is
timed. The bare loop has a stage with the same weights, the same DeepSpeed file and parameter groups, torch's fused
AdamW, DeepSpeed's clipping and its batches in memory, and does forward, backward and step alone. Both live in the same
processes and take turns, a few steps each; Python's garbage is collected in neither. Machines drift, so each turn of
ours is compared with the two of the bare loop around it. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import deepspeed
import torch
from common import gib, origin, peak_memory, summary, write
from rich.console import Console
from stages import accelerator, synchronizer
from torch import Tensor
from training_job import NEVER, counted, make_run, opened, run_job

from launcher.recipe import Recipe, load_recipe
from model.initialisation import parameter_groups
from trainer.callback import Callback
from trainer.deepspeed_settings import deepspeed_config
from trainer.engine import execution
from trainer.training import Training

LIBRARIES = ("torch", "deepspeed", "mosaicml-streaming", "numpy")
STAGE = "coarse"
OURS, BARE = "ours", "bare"
AIM = 0.97
"""Of the bare loop's steps a second."""
CLIPS = 1024
PREPARED = 16
"""Steps whose batches the bare loop has in memory, and goes round."""
WARM_UP = 2
"""Rounds that do not count."""


@dataclass(frozen=True)
class Size:
    name: str
    overrides: tuple[str, ...]


SIZES = (
    Size("quickstart", ()),
    Size("57 M", ("model.transformer={dim: 768, layers: 8, heads: 12}", "train.global_batch=4")),
)
TINY = (
    Size(
        "tiny", ("model.transformer={dim: 64, layers: 2, heads: 1}", "model.window_seconds=1.0", "train.global_batch=4")
    ),
)


class Turns(Callback):
    """After every `steps` steps of ours the bare loop takes as many, `rounds` times; keeps the seconds of a step."""

    def __init__(self, bare: Callable[[int], None], steps: int, rounds: int) -> None:
        self.bare = bare
        self.steps = steps
        self.rounds = rounds
        self.seconds: dict[str, list[float]] = {OURS: [], BARE: []}
        self._started = 0.0

    def on_start(self, training: Training) -> None:
        self._started = self._now(training)

    def after_step(self, training: Training, losses: Tensor) -> None:
        number, rest = divmod(training.step, self.steps)
        if rest or number > self.rounds:
            return
        self.seconds[OURS].append((self._now(training) - self._started) / self.steps)
        with training.aside():
            started = self._now(training)
            self.bare(self.steps)
            self.seconds[BARE].append((self._now(training) - started) / self.steps)
        self._started = self._now(training)

    def _now(self, training: Training) -> float:
        """Once all ranks have come here and their devices are done."""
        synchronizer(training.engine.device.type)()
        training.engine.barrier()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure with")
    parser.add_argument("--steps", type=int, default=10, help="of each in a round; metrics are written every 10 steps")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--small", action="store_true", help="a tiny stage, few steps: to see that this works")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.steps, arguments.rounds = 4, 2
    console = Console(width=120)
    record = origin(LIBRARIES)
    record["machine"]["accelerator"] = accelerator("cuda" if torch.cuda.is_available() else "cpu")
    record["settings"] = {name: value for name, value in vars(arguments).items() if name != "record"}
    record["sizes"] = []
    for size, ranks in itertools.product(TINY if arguments.small else SIZES, arguments.ranks):
        entry = measured(size, ranks, arguments)
        record["sizes"].append(entry)
        share = entry["share"]
        met = "met" if share["median"] >= AIM else "not met"
        console.print(
            f"{size.name}, {ranks} ranks: {share['median']:.1%} of the bare loop's steps a second "
            f"(quartiles {share['quartiles'][0]:.1%} and {share['quartiles'][1]:.1%}), {AIM:.0%} {met}",
            highlight=False,
        )
    if arguments.record:
        write(arguments.record, record)


def measured(size: Size, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rounds = WARM_UP + arguments.rounds
    recipe = recipe_of(size, ranks, arguments.steps * rounds)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(run, recipe, STAGE, CLIPS)
        found = run_job(train, ranks, run, arguments.steps, rounds)
    count, stage = counted(recipe, STAGE), recipe.stages.coarse
    seconds = found.pop("seconds")
    results = {name: summary(turns[WARM_UP:]) for name, turns in seconds.items()}
    for result in results.values():
        result["steps_per_second"] = round(1 / result["median"], 3)
    return {
        "name": size.name,
        "ranks": ranks,
        "parameters": count.parameters,
        "positions": stage.train.global_batch * count.positions,
        "stage": stage.model_dump(mode="json"),
        "results": results,
        "share": share_of_bare(seconds),
        **found,
    }


def share_of_bare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Steps a second of ours, of the bare loop's in the turns before and after."""
    ours, bare = seconds[OURS], seconds[BARE]
    turns = range(WARM_UP, len(ours))
    shares = [(bare[turn - 1] + bare[turn]) / 2 / ours[turn] for turn in turns]
    low, _, high = quantiles(shares, n=4)
    return {
        "median": round(median(shares), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "turns": [round(share, 4) for share in shares],
        "aim": AIM,
    }


def recipe_of(size: Size, ranks: int, steps: int) -> Recipe:
    train = {
        "ranks": ranks,
        "steps": steps + 1,  # the last one saves and validates whatever the recipe says
        "validate_every": NEVER,
        "checkpoint_every": NEVER,
        "warmup_steps": 1,
    }
    own = [f"train.{name}={value}" for name, value in train.items()]
    return load_recipe("quickstart", [f"stages.{STAGE}.{override}" for override in (*size.overrides, *own)])


def train(run: Path, steps: int, rounds: int) -> dict[str, Any]:
    """One rank's job."""
    with opened(run, STAGE) as training:
        turns = Turns(bare_loop(training), steps, rounds)
        training.callbacks.append(turns)
        training.run()
        return {
            "compile": execution(training.config).compile,
            "threads": torch.get_num_threads(),
            "seconds": turns.seconds,
            "peak_memory_gib": gib(peak_memory()),
        }


def bare_loop(training: Training) -> Callable[[int], None]:
    """Trains another stage, like that of `training`, for so many steps by DeepSpeed alone."""
    config, engine = training.config, training.engine
    model = training.setup.build_model()
    groups = parameter_groups(model, model.config.transformer, config.learning_rate, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.learning_rate, config.betas, fused=True)
    settings = deepspeed_config(config, engine.world_size) | {"gradient_clipping": config.clip}
    bare, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    bare.module.configure(execution(config))
    batches = itertools.cycle([training.data.take(engine.accumulation) for _ in range(PREPARED)])

    def run(steps: int) -> None:
        for _ in range(steps):
            for batch, dropped in next(batches):
                bare.backward(bare(batch, dropped).mean())
                bare.step()

    return run


if __name__ == "__main__":
    main()
