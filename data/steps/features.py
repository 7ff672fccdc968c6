"""Plain spectral features, kept beside the tokens for whoever wants to train or to judge on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torchaudio.functional import create_dct

from data.steps.config import MFCC_MEL_BANDS
from data.steps.spectral import NOTE_SECONDS, PitchClasses, SpectralStep
from data.waves import Waves
from model.encoders.spectrum import LogMel

MEL_BANDS = 80
COEFFICIENTS = 20
WINDOW_SECONDS = 0.064
FLOOR = 1e-6
"""Added to every power, so that silence has a logarithm."""
COLUMNS = {"mel": "mel", "mfcc": "mfcc", "chroma": "chroma_features"}
"""The column for each kind of feature: `chroma` alone are the melody tokens."""


class Features(SpectralStep):
    """One kind of feature: float16 `[frames, bands]`.

    `mel` is the natural logarithm of mel power; `mfcc` the first coefficients of its orthonormal cosine transform over
    40 bands (Davis and Mermelstein 1980); `chroma` the amplitudes of the 12 pitch classes, of unit length but fading
    away in silence.
    """

    def __init__(self, of: str, rate_hz: float, sample_rate: int, bands: int | None) -> None:
        super().__init__(rate_hz, sample_rate)
        self.column = COLUMNS[of]
        self.columns = {self.column: "ndarray:float16"}
        if of == "chroma":
            self.pitch_classes = PitchClasses(sample_rate, self.window(NOTE_SECONDS), self.hop)
        else:
            mel_bands = (bands or MEL_BANDS) if of == "mel" else MFCC_MEL_BANDS
            self.log_mel = LogMel(mel_bands, sample_rate, self.window(WINDOW_SECONDS), self.hop, FLOOR)
            self.cosines = create_dct(bands or COEFFICIENTS, mel_bands, norm="ortho")
        self.features = {"mel": self._mel, "mfcc": self._mfcc, "chroma": self._chroma}[of]

    def arrays(self, batch: Waves) -> dict[str, Sequence[Any]]:
        frames = self.frames(batch.clips[0].seconds)
        values = self.features(batch.waves[self.kind])[:, :frames]
        return {self.column: list(values.numpy().astype(np.float16))}

    def _mel(self, wave: Tensor) -> Tensor:
        return self.log_mel(wave)

    def _mfcc(self, wave: Tensor) -> Tensor:
        return self.log_mel(wave) @ self.cosines

    def _chroma(self, wave: Tensor) -> Tensor:
        power = self.pitch_classes(wave)
        return (power / (power.sum(-1, keepdim=True) + FLOOR)).sqrt()
