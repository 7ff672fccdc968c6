"""What the spectral steps share: spectra on the clock of the clips."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from data.corpus import Clip
from data.steps.base import Step
from data.waves import Kind
from model.encoders.chroma import pitch_class_filters
from model.encoders.spectrum import stft_frames, window_length
from model.errors import UserError

NOTE_SECONDS = 0.25
"""Length of the window that notes are told apart in."""


class SpectralStep(Step):
    """Works out something for each [t / rate_hz, (t + 1) / rate_hz) of a clip; a last part of a frame is left out."""

    def __init__(self, rate_hz: float, sample_rate: int) -> None:
        self.rate = Fraction(rate_hz).limit_denominator(1_000_000)
        self.sample_rate = sample_rate
        self.hop = int(sample_rate / self.rate)
        self.kind: Kind = (sample_rate, 1)
        self.kinds = [self.kind]

    def prepare(self, clips: Sequence[Clip]) -> list[Clip]:
        shortest = min(clip.seconds for clip in clips)
        if not self.frames(shortest):
            raise UserError(
                f"tokens.steps: at rate_hz {float(self.rate):g} a clip of {shortest:g} s has no frame: raise it to "
                f"{1 / shortest:.3g} or more."
            )
        return list(clips)

    def frames(self, seconds: float) -> int:
        """Whole frames in `seconds`."""
        return int(Fraction(seconds).limit_denominator(1_000_000) * self.rate)

    def window(self, seconds: float) -> int:
        """Samples of a window of about `seconds`, no shorter than a frame: every sample is heard."""
        return max(window_length(self.sample_rate, seconds), 1 << (self.hop - 1).bit_length())


class PitchClasses:
    """Power of the 12 pitch classes (C first, A = 440 Hz): `[batch, samples]` → `[batch, samples // hop, 12]`.

    A full-scale sine has a power near 1 in its class.
    """

    def __init__(self, sample_rate: int, window: int, hop: int) -> None:
        self.window, self.hop = torch.hann_window(window), hop
        filters = pitch_class_filters(sample_rate, window)
        # Peaks of 1, and less what the window spreads over neighbouring bins: 1.5 times a sine's power for Hann.
        self.filters = filters / (filters.max() * 1.5)

    def __call__(self, wave: Tensor) -> Tensor:
        spectrum = stft_frames(wave, self.window, self.hop)
        return (spectrum.real.square() + spectrum.imag.square()) @ self.filters
