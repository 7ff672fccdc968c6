"""What training withholds from the model: conditions, for guidance, and codes of its own past.

Shapes are named by letters: B batch, T frames, Q quantizers, N conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import StageModelConfig


@dataclass(frozen=True)
class Dropped:
    """What some windows do without. It is drawn for every batch and passed in, so no mode can switch it off."""

    conditions_BN: Tensor
    """bool, in the order of the recipe's conditions."""
    codes_BTQ: Tensor | None = None
    """bool: the stream's own codes that later steps do not see; they are predicted all the same."""

    def to(self, device: torch.device) -> Dropped:
        codes = None if self.codes_BTQ is None else self.codes_BTQ.to(device, non_blocking=True)
        return Dropped(self.conditions_BN.to(device, non_blocking=True), codes)

    def window(self, index: int) -> Dropped:
        """What the window `index` does without, as a batch of one."""
        codes = None if self.codes_BTQ is None else self.codes_BTQ[index : index + 1]
        return Dropped(self.conditions_BN[index : index + 1], codes)


def draw_dropped(config: StageModelConfig, shape: torch.Size, generator: torch.Generator) -> Dropped:
    """Drawn for a batch of codes of `shape [B, T, Q]`: all conditions of a window, each of them alone, own codes."""
    windows = shape[0]
    everything = torch.rand(windows, 1, generator=generator) < config.condition_dropout
    alone = torch.tensor([condition.dropout for condition in config.conditions])
    dropped = everything | (torch.rand(windows, len(config.conditions), generator=generator) < alone)
    if not config.forgetful_masking:
        return Dropped(dropped)
    share = torch.rand(windows, 1, 1, generator=generator) * config.forgetful_masking
    return Dropped(dropped, torch.rand(shape, generator=generator) < share)
