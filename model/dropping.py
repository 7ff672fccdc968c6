"""What training withholds from the model: conditions, for guidance, and codes of its own past.

Shapes are named by letters: B batch, T frames, Q quantizers, N conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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


def draw_dropped(config: StageModelConfig, draws_B: Tensor, frames: int, quantizers: int) -> Dropped:
    """What windows of `frames` frames do without: all conditions of a window, each of them alone, own codes.

    `draws_B`, int64 and not negative, holds a number for each window, which alone decides: neither the rest of its
    batch nor the rank matters, a longer window begins as a shorter one, and every machine draws the same. The numbers
    are keys of the counter-based generator Philox 4×64 (Salmon et al. 2011).
    """
    conditions = len(config.conditions)
    count = 2 + conditions + (frames * quantizers if config.forgetful_masking else 0)
    random = np.stack([_random(draw, count) for draw in draws_B.tolist()])
    everything, share, alone, codes = np.split(random, [1, 2, 2 + conditions], axis=1)
    dropped = (everything < config.condition_dropout) | (alone < [part.dropout for part in config.conditions])
    if not config.forgetful_masking:
        return Dropped(torch.from_numpy(dropped))
    forgotten = codes < share * config.forgetful_masking
    return Dropped(torch.from_numpy(dropped), torch.from_numpy(forgotten).reshape(-1, frames, quantizers))


def _random(key: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), the same with every version of numpy, whose raw streams do not change (NEP 19)."""
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8").view("<u4")
    return words[:count] * 2.0**-32
