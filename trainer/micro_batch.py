"""`micro_batch: auto`: the most windows a forward pass has memory for, found by trial steps before the first one."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ds_configs
from data.windows import DRAW
from model import artifact
from model.errors import UserError
from model.fields import CONDITIONING
from trainer.batches import with_dropped
from trainer.engine import Engine
from trainer.memory import clear_memory, free_memory, held_memory, on_gpu, out_of_memory, peak_memory
from trainer.setup import SWAP, StageSetup

log = logging.getLogger(__name__)

FOUND = "micro_batch.json"
"""In a stage's folder: what was found, how, and for what."""
USABLE = 0.9
"""Share of the free memory that a step may take: validation, samples, collectives and gaps between tensors come on top.
As much as `stretto plan` counts with."""
MATTERS = ("global_batch", "precision", "packing", "attention", "compile", "kernels", "recompute", "checkpoint_async")
"""Keys of `train` with which another micro batch may fit; of the DeepSpeed file all count."""


@dataclass(frozen=True)
class Trial:
    """One step with `micro_batch` windows a rank and forward pass."""

    micro_batch: int
    fits: bool
    peak: int | None
    """Bytes of the rank that took most; None where the memory ran out."""


def with_micro_batch(setup: StageSetup, beat: Callable[[str], None]) -> StageSetup:
    """`setup` with a number in the place of `micro_batch: auto`: the one found before for the same training on the same
    devices, or else one found now. All ranks must call it; `beat` hears of each trial.

    Raises UserError where not even one window at a time fits.
    """
    if setup.config.train.micro_batch != "auto":
        return setup
    path = setup.folder / FOUND
    purpose = _purpose(setup)
    box = [_read(path, purpose)]
    dist.broadcast_object_list(box)
    found = box[0]
    return with_micro_batch_of(setup, _find(setup, purpose, path, beat) if found is None else found)


def with_micro_batch_of(setup: StageSetup, micro_batch: int) -> StageSetup:
    train = setup.config.train.model_copy(update={"micro_batch": micro_batch})
    return replace(setup, config=setup.config.model_copy(update={"train": train}))


def _purpose(setup: StageSetup) -> dict[str, Any]:
    """What a finding holds for."""
    train = setup.config.train
    return {
        "device": torch.cuda.get_device_name() if on_gpu() else "cpu",
        "ranks": dist.get_world_size(),
        "architecture": setup.identity["architecture"],
        "zero": ds_configs.read(train.zero),
        "averaged": train.ema_decay is not None,
        **{key: getattr(train, key) for key in MATTERS},
    }


def _read(path: Path, purpose: dict[str, Any]) -> int | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found["micro_batch"] if found["for"] == purpose else None


def _find(setup: StageSetup, purpose: dict[str, Any], path: Path, beat: Callable[[str], None]) -> int:
    """Searches, and rank 0 writes down what was found."""
    together = Together()
    config = setup.config.train
    of_a_rank = config.global_batch // dist.get_world_size()
    candidates = [count for count in range(1, of_a_rank + 1) if of_a_rank % count == 0]
    with memory_limit(together) as limit:
        at_rest = None if on_gpu() else together.most(held_memory())

        def trial(micro_batch: int) -> Trial:
            beat(f"a trial step of {micro_batch} windows at a time")
            return try_step(with_micro_batch_of(setup, micro_batch), limit, together)

        trials = search(candidates, trial, limit, at_rest)
    together.end()
    found = max((one.micro_batch for one in trials if one.fits), default=None)
    tried = ", ".join(str(one.micro_batch) for one in trials)
    room = f"{limit / 2**30:.2f} GiB that a rank may take"
    if found is None:
        raise UserError(
            f"micro_batch auto: not even one window at a time fits into the {room}. Use more ranks, another file of "
            f"ds_configs (train.zero), train.recompute=block or a smaller transformer."
        )
    if dist.get_rank() == 0:
        log.info("micro_batch: %d of the %d windows of a rank, by the %s (tried %s)", found, of_a_rank, room, tried)
        finding = {"micro_batch": found, "accumulation": of_a_rank // found, "limit": limit}
        artifact.write_json(path, {**finding, "trials": [asdict(one) for one in trials], "for": purpose})
    return found


def search(candidates: Sequence[int], trial: Callable[[int], Trial], limit: int, at_rest: int | None) -> list[Trial]:
    """Trials, until the largest of the rising `candidates` that fits is known, or the smallest does not.

    Memory grows in a line with the windows. So what was measured says which of the larger ones can be expected to fit,
    and only the largest of those is tried: where there is no GPU, a process that takes too much is killed. There
    `at_rest`, the memory before the first trial, is where the line starts.
    """
    trials: list[Trial] = []
    points = [] if at_rest is None else [(0, at_rest)]
    low, high, pick = -1, len(candidates), 0
    while low < pick < high:
        trials.append(trial(candidates[pick]))
        if trials[-1].peak is not None:
            points.append((candidates[pick], trials[-1].peak))
        low, high = (pick, high) if trials[-1].fits else (low, pick)
        larger = list(range(low + 1, high)) if low >= 0 else []
        if len(points) > 1:
            larger = [n for n in larger if _predicted(points[-2:], candidates[n]) <= limit]
        else:
            larger = larger[:1]  # of which nothing is known
        pick = larger[-1] if larger else low
    return trials


def _predicted(points: list[tuple[int, int]], windows: int) -> float:
    """Bytes of a step, on the line through two points that were measured."""
    (first, before), (second, after) = points[0], points[-1]
    return after + (windows - second) * (after - before) / (second - first)


def try_step(setup: StageSetup, limit: int, together: Together) -> Trial:
    """One step of an engine that is thrown away, with full windows."""
    micro_batch = setup.config.train.micro_batch
    assert isinstance(micro_batch, int)
    clear_memory()
    short = 0
    try:
        _step(setup, micro_batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        short = 1
    peak = peak_memory()
    clear_memory()
    short, peak = together.most(short, peak)
    return Trial(micro_batch, not short and peak <= limit, None if short else peak)


def _step(setup: StageSetup, micro_batch: int) -> None:
    engine = Engine(setup.build_model(), setup.config.train, setup.folder / SWAP)
    try:
        # Beside the training checkpoints are written, from copies in the host's memory.
        copies = [value.to("cpu", copy=True) for part in engine.held() for value in part.tensors.values()]
        windows = full_windows(setup, micro_batch)
        packed = [{name: codes[n : n + 1] for name, codes in windows.items()} for n in range(micro_batch)]
        batch = with_dropped(engine.module, packed if setup.config.train.packing else windows, engine.device)
        engine.train_step([batch] * engine.accumulation)
        del copies
    finally:
        engine.destroy()


def full_windows(setup: StageSetup, count: int) -> dict[str, torch.Tensor]:
    """A batch of `count` windows of the longest kind there is."""
    seconds = setup.config.model.window_seconds
    fields = {name: setup.fields[name] for name in setup.fields_used}
    frames = {name: 1 if name == CONDITIONING else field.frames(seconds) for name, field in fields.items()}
    codes = {n: torch.zeros(count, frames[n], f.quantizers, dtype=torch.int64) for n, f in fields.items()}
    return {**codes, DRAW: torch.arange(count)}


class Together:
    """Ranks agree on numbers, over gloo: an engine that could do it may just have run out of memory."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def most(self, *values: int) -> Any:
        """The largest of each of `values` over the ranks; a plain number where it is one."""
        box = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
        return box.tolist() if len(values) > 1 else box.item()

    def end(self) -> None:
        dist.destroy_process_group(self._group)


@contextlib.contextmanager
def memory_limit(together: Together) -> Iterator[int]:
    """Bytes that a rank may take, the same on all of them. On GPUs torch takes no more meanwhile, so that all ranks
    run out of memory at the same place and none waits for another."""
    limit = -together.most(-int(USABLE * (free_memory() + held_memory())))
    if not on_gpu():
        yield limit
        return
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
