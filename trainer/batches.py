"""The windows of each optimizer step of one rank, on its device, and how long it had to wait for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from data.mixture import Mixture
from data.windows import DRAW, WindowLoader, window_loader
from model.dropping import Dropped, draw_dropped
from model.stage import Batch, StageTransformer
from trainer.corpora import cache_folder, mixture, training_cache, validation_corpus
from trainer.engine import MicroBatch
from trainer.setup import StageSetup
from trainer.stopwatch import Stopwatch


def open_loader(setup: StageSetup, split: str, micro_batch: int, text_probability: float) -> WindowLoader:
    """The windows of one split, each rank's own: for `train` those of all corpora, shuffled; for the others the run's
    own as they lie, whatever is mixed and filtered in training."""
    train, shuffle = setup.config.train, split == "train"
    return window_loader(
        mixture(setup) if shuffle else Mixture((validation_corpus(setup),)),
        split,
        setup.fields_used,
        setup.config.model.window_seconds,
        batch=micro_batch,
        seed=setup.seed,
        global_batch=train.global_batch if shuffle else None,
        text_probability=text_probability,
        workers=train.workers if shuffle else 0,
        shuffle=shuffle,
        packed=train.packing,
        at_most=None if shuffle else train.validate_windows,
        cache=cache_folder(setup),
        cache_limit=training_cache(setup) if shuffle else None,
    )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    def moved(window: Batch) -> Batch:
        return {name: codes.to(device, non_blocking=True) for name, codes in window.items()}

    return [moved(window) for window in batch] if isinstance(batch, list) else moved(batch)


def with_dropped(
    model: StageTransformer, batch: MicroBatch, device: torch.device
) -> tuple[MicroBatch, Dropped | list[Dropped]]:
    """A micro batch and what it does without, on `device`. Raises UserError where it does not fit the stage."""

    def dropped(window: Batch) -> Dropped:
        _, frames, quantizers = model.own_codes(window).shape
        model.check(window, frames)  # while the codes are in host memory
        return draw_dropped(model.config, window[DRAW], frames, quantizers).to(device)

    without = [dropped(window) for window in batch] if isinstance(batch, list) else dropped(batch)
    return to_device(batch, device), without


class TrainingBatches:
    """Micro batches without end, epoch after epoch, with what their windows do without.

    What is dropped is a pure function of (seed, epoch, clip), so the place in the data is all there is to save.
    """

    def __init__(self, setup: StageSetup, model: StageTransformer, micro_batch: int, device: torch.device) -> None:
        self.loader = open_loader(setup, "train", micro_batch, setup.config.train.text_probability)
        self.model = model
        self.device = device
        self.waited = Stopwatch(device)
        """Time spent here: reading, cutting, waiting for loader processes; of a device that is busy meanwhile, none."""
        self.windows: Counter[int] = Counter()
        """How many windows this rank has taken so far, by their frames of the predicted field."""
        self._batches: Iterator[MicroBatch] | None = None

    def take(self, count: int) -> list[tuple[MicroBatch, Dropped | list[Dropped]]]:
        """The next `count` micro batches. All ranks must call it."""
        if self._batches is None:
            self._batches = self._endless()
        with self.waited.running():
            return [self._with_dropped(next(self._batches)) for _ in range(count)]

    def close(self) -> None:
        """Ends the loader's processes; no more batches can be taken."""
        self._batches = None
        self.loader.close()

    def _endless(self) -> Iterator[MicroBatch]:
        while True:
            yield from self.loader

    def _with_dropped(self, batch: MicroBatch) -> tuple[MicroBatch, Dropped | list[Dropped]]:
        for window in batch if isinstance(batch, list) else [batch]:
            number, frames = window[self.model.config.field].shape[:2]
            self.windows[frames] += number
        return with_dropped(self.model, batch, self.device)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
