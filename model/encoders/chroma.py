"""The built-in semantic features: what is struck when, how high, how bright and on which notes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import SemanticEncoderConfig
from model.encoders.spectrum import LogMel, map_spectra, window_length
from model.errors import UserError

BANDS = 40
FLOOR = 1e-6
LEVEL_SHARE = 0.5
"""How much of a clip's own loudness is taken out of its spectra."""
# What each part counts for in the distance that k-means sees.
SPECTRUM_WEIGHT, ONSET_WEIGHT, CHROMA_WEIGHT = 1.0, 1.0, 4.0
LOWEST_NOTE_HZ, HIGHEST_NOTE_HZ = 80.0, 2000.0


class MelChroma:
    """Mel spectrum (timbre, register, drums), its rise since the frame before (rhythm) and chroma (notes).

    The features of a frame are `BANDS` log-mel bands, `BANDS` onsets and 12 pitch classes, each part weighted.
    """

    dim = 2 * BANDS + 12

    def __init__(self, config: SemanticEncoderConfig) -> None:
        if config.sample_rate % (2 * config.frame_rate):
            raise UserError(
                f"encoders.semantic.frame_rate {config.frame_rate} must divide half of sample_rate "
                f"{config.sample_rate}."
            )
        self.sample_rate = config.sample_rate
        self.rate_hz = float(config.frame_rate)
        self.hop = config.sample_rate // config.frame_rate
        # Twice the token rate: a frame is the mean of two spectra, and an onset is seen within either half.
        window = window_length(config.sample_rate, 0.064)
        self.log_mel = LogMel(BANDS, config.sample_rate, window, self.hop // 2, FLOOR)
        self.note_window = torch.hann_window(window_length(config.sample_rate, 0.25))
        self.pitch_classes = pitch_class_filters(config.sample_rate, len(self.note_window))

    @classmethod
    def feature_dim(cls, config: SemanticEncoderConfig) -> int:
        return cls.dim

    @torch.no_grad()
    def features(self, wave: Tensor) -> Tensor:
        """Float32 `[batch, samples // hop, dim]` of `wave` `[batch, samples]`."""
        frames = wave.shape[-1] // self.hop
        wave = wave[..., : frames * self.hop]
        mel = self.log_mel(wave)
        rise = torch.diff(mel, dim=1, prepend=mel[:, :1]).clamp_min(0)
        onset = rise.view(len(wave), frames, 2, BANDS).amax(2)
        loudness = mel.exp().mean((1, 2), keepdim=True).log()
        spectrum = mel.view(len(wave), frames, 2, BANDS).mean(2) - LEVEL_SHARE * loudness
        chroma = map_spectra(lambda notes: notes.abs() @ self.pitch_classes, wave, self.note_window, self.hop)
        # The floor lets the notes of near silence fade away in place of being noise at full weight.
        chroma = chroma / (chroma.square().sum(-1, keepdim=True) + FLOOR).sqrt()
        return torch.cat([SPECTRUM_WEIGHT * spectrum, ONSET_WEIGHT * onset, CHROMA_WEIGHT * chroma], -1)


def pitch_class_filters(sample_rate: int, n_fft: int) -> Tensor:
    """`[n_fft // 2 + 1, 12]`: how much each bin counts for each pitch class (C first, A = 440 Hz), a Gaussian of half
    a semitone around it; bins outside the range where melodies lie count for nothing.
    """
    frequency = torch.arange(1, n_fft // 2 + 1) * (sample_rate / n_fft)
    note = 69 + 12 * torch.log2(frequency / 440)
    distance = (note[:, None] - torch.arange(12) + 6) % 12 - 6
    weight = torch.exp(-0.5 * (distance / 0.5) ** 2)
    weight[(frequency < LOWEST_NOTE_HZ) | (frequency > HIGHEST_NOTE_HZ)] = 0
    return torch.cat([torch.zeros(1, 12), weight / math.sqrt(12)])
