"""What hangs on the training loop: a new habit of the trainer is one class, and one line in `training.callbacks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from trainer.training import Training


class Callback:
    """Every rank has every callback, so that one may call collectives; all methods do nothing unless overridden."""

    def on_start(self, training: Training) -> None:
        """Before the first step of this process; a checkpoint has been loaded where there was one."""

    def before_step(self, training: Training) -> None:
        """`training.step` steps are done."""

    def after_step(self, training: Training, losses: Tensor) -> None:
        """`training.step` counts the one just done; `losses` `[quantizers]` are its, over all ranks, on the device."""

    def on_checkpoint(self, training: Training, step: int) -> None:
        """The checkpoint of `step` has got its name."""

    def on_end(self, training: Training) -> None:
        """After the last step, once the weights are written."""
