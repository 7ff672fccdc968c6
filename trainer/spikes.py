"""Which steps to leave out: those whose loss is not a number, or far above what it has been. Kept on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 0.98
"""Share of the running mean that a step keeps: some fifty steps are remembered."""
SETTLING = 50
"""Steps before a loss can count as a spike: until then the mean is of too few."""
SMALLEST_DEVIATION = 0.01
"""Of the mean. Where losses hardly vary, a small rise is many deviations and still no spike."""


@dataclass(frozen=True)
class SpikeState:
    """What the host learns of it, when it asks."""

    mean: float
    bad_in_a_row: int
    bad: int
    """Steps left out so far."""


class SpikeGuard:
    """Judges the mean loss of each step over all ranks, before the weights are changed.

    A loss is bad when it is not finite, or more than `threshold` standard deviations above its running mean; without a
    threshold only the first. Bad ones do not enter the mean. All ranks see the same losses and so judge alike.
    """

    def __init__(self, threshold: float | None, device: torch.device) -> None:
        self.threshold = threshold
        # mean, mean of squares of the deviation, good steps, bad steps in a row, bad steps
        self._state = torch.zeros(5, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor) -> Tensor:
        """Whether the step of this loss is bad, as 0 or 1 on the device."""
        mean, variance, good, _, _ = self._state
        bad = ~torch.isfinite(loss)
        if self.threshold is not None:
            deviation = torch.maximum(variance.sqrt(), SMALLEST_DEVIATION * mean)
            bad |= (good >= SETTLING) & (loss > mean + self.threshold * deviation)
        return bad.float()

    def record(self, loss: Tensor, skipped: Tensor) -> None:
        """Takes note of a step after the fact; a gradient that is not finite is found later than its loss."""
        mean, variance, good, in_a_row, bad = self._state
        skip = skipped.bool()
        finite = torch.where(skip, mean, loss.double())
        keep = torch.minimum(torch.tensor(MEMORY, device=loss.device), good / (good + 1))  # a plain mean at first
        difference = finite - mean
        self._state = torch.stack(
            [
                mean + torch.where(skip, 0.0, (1 - keep) * difference),
                torch.where(skip, variance, keep * (variance + (1 - keep) * difference**2)),
                good + ~skip,
                torch.where(skip, in_a_row + 1, 0.0),
                bad + skip,
            ]
        )

    def read(self) -> SpikeState:
        """Waits for the device."""
        mean, _, _, in_a_row, bad = self._state.tolist()
        return SpikeState(mean, int(in_a_row), int(bad))

    def state_dict(self) -> list[float]:
        return self._state.tolist()

    def load_state_dict(self, state: list[float]) -> None:
        self._state = torch.tensor(state, dtype=torch.float64, device=self._state.device)
