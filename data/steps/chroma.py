"""Melody tokens: which note is heard when, whatever its octave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.steps.config import PITCH_CLASSES
from data.steps.spectral import NOTE_SECONDS, PitchClasses, SpectralStep
from data.waves import Waves
from model.fields import TokenField

CHROMA = "chroma"
NO_PITCH = PITCH_CLASSES
"""The token of a frame without a clear pitch."""
FAINTEST = 1e-6
"""Power (-60 dB of full scale) below which a pitch class counts as silent."""
CLEAR = 0.2
"""Share of the power of all pitch classes that the strongest must have: an even spectrum has 1/12, a triad 1/3."""


class Melody(SpectralStep):
    """The strongest pitch class of each frame: uint8 `[frames]`, 0 (C) to 11 (B), 12 where no pitch is clear.

    The quantised chromagram of MusicGen (Copet et al. 2023, section 2.3), at a rate of its own and with a token for
    frames without pitch.
    """

    def __init__(self, rate_hz: float, sample_rate: int) -> None:
        super().__init__(rate_hz, sample_rate)
        self.columns = {CHROMA: "ndarray:uint8"}
        self.fields = [TokenField(CHROMA, float(self.rate), 1, PITCH_CLASSES + 1)]
        self.pitch_classes = PitchClasses(sample_rate, self.window(NOTE_SECONDS), self.hop)

    def arrays(self, batch: Waves) -> dict[str, Sequence[Any]]:
        frames = self.frames(batch.clips[0].seconds)
        return {CHROMA: list(self.tokens(batch.waves[self.kind])[:, :frames].numpy())}

    def tokens(self, wave: Tensor) -> Tensor:
        """uint8 `[batch, samples // hop]` of `wave` `[batch, samples]`."""
        power = self.pitch_classes(wave)
        strongest, pitch_class = power.max(-1)
        clear = (strongest > FAINTEST) & (strongest > CLEAR * power.sum(-1))
        return torch.where(clear, pitch_class, NO_PITCH).to(torch.uint8)
