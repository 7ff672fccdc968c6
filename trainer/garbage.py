"""Python's garbage, collected by all ranks at the same step: a rank that stops for it alone makes all others wait."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.callback import Callback

if TYPE_CHECKING:
    from trainer.training import Training


class GarbageCollection(Callback):
    """Collects every `gc_every` steps and never in between; what is there before the first step is left out of it."""

    def on_start(self, training: Training) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, training: Training, losses: Tensor) -> None:
        if training.step % training.config.gc_every == 0:
            gc.collect()

    def on_end(self, training: Training) -> None:
        gc.enable()
        gc.unfreeze()
