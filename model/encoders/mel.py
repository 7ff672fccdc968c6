"""The built-in codec: residual k-means of log-mel spectra one way, Griffin-Lim the other. Nothing to download."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.config import CodecConfig
from model.encoders.spectrum import LogMel, stft_frames, window_length
from model.errors import UserError
from model.fields import ACOUSTIC, TokenField
from model.kmeans import ResidualKMeans

MEL_HZ = 50
"""Spectra a second, about: a code frame holds the whole number of them that comes nearest."""
WINDOW_SECONDS = 0.064
FLOOR = 1e-7
"""Mel power taken for silence: 70 dB below a full-scale sine. It is added before the log and subtracted after."""
GRIFFIN_LIM_STEPS = 32
MOMENTUM = 0.99
INVERSION_STEPS = 12


class MelCodec:
    """Log-mel spectra as residual k-means codes.

    A code frame stacks the spectra centred in it (two of 20 ms at 25 Hz) into one vector. Decoding sums the centroids,
    finds the non-negative spectrum with those mel powers, and its phases by Griffin-Lim.
    """

    channels = 1
    fitted = True

    def __init__(self, config: CodecConfig, quantizer: ResidualKMeans | None = None) -> None:
        if config.sample_rate % config.frame_rate:
            raise UserError(
                f"encoders.codec.frame_rate {config.frame_rate} must divide sample_rate {config.sample_rate}: "
                "a code frame is a whole number of samples."
            )
        self.sample_rate = config.sample_rate
        self.field = TokenField(ACOUSTIC, config.frame_rate, config.quantizers, config.codebook_size)
        self.frame_samples = config.sample_rate // config.frame_rate
        self.stack = max(1, round(MEL_HZ / config.frame_rate))
        while self.frame_samples % self.stack:
            self.stack -= 1
        self.hop = self.frame_samples // self.stack
        self.log_mel = LogMel(
            config.mel_bands, config.sample_rate, window_length(config.sample_rate, WINDOW_SECONDS), self.hop, FLOOR
        )
        self.dim = self.stack * config.mel_bands
        self.quantizer = quantizer or ResidualKMeans(config.quantizers, config.codebook_size, self.dim)

    def vectors(self, wave: Tensor) -> Tensor:
        """What is quantized: `[batch, samples]` → `[batch, frames, dim]`."""
        frames = wave.shape[-1] // self.frame_samples
        return self.log_mel(wave[..., : frames * self.frame_samples]).view(len(wave), frames, self.dim)

    @property
    def silence(self) -> Tensor:
        """The vector `[dim]` of a silent frame."""
        return self.vectors(torch.zeros(1, self.frame_samples))[0, 0]

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes int64 `[batch, samples // frame_samples, quantizers]` of `wave` `[batch, samples]`."""
        return self.quantizer.encode(self.vectors(wave))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """A wave `[batch, frames × frame_samples]`; the same codes give the same wave."""
        log_mel = self.quantizer.decode(codes).view(len(codes), -1, self.log_mel.filters.shape[1])
        mel = (log_mel.exp() - FLOOR).clamp_min(0)
        return griffin_lim(invert_filters(mel, self.log_mel.filters).sqrt(), self.log_mel.window, self.hop)

    def save(self, folder: Path) -> None:
        self.quantizer.save(folder / "codec.safetensors")

    @classmethod
    def load(cls, folder: Path, config: CodecConfig) -> MelCodec:
        return cls(config, ResidualKMeans.load(folder / "codec.safetensors"))


def invert_filters(mel: Tensor, filters: Tensor) -> Tensor:
    """A non-negative spectrum `[..., bins]` whose mel powers come near `mel` `[..., bands]`, by the multiplicative
    updates of Lee and Seung (2001) for the squared error, from the power spread evenly over each band.
    """
    power = mel @ (filters / filters.sum(0)).T
    wanted = mel @ filters.T
    overlap = filters @ filters.T
    for _ in range(INVERSION_STEPS):
        power = power * wanted / (power @ overlap).clamp_min(1e-20)
    return power


def griffin_lim(magnitude: Tensor, window: Tensor, hop: int, seed: int = 0) -> Tensor:
    """The wave `[batch, frames × hop]` whose spectra come near `magnitude` `[batch, frames, bins]`.

    Griffin-Lim with momentum (Perraudin, Balazs and Sondergaard 2013), from phases that are a function of `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(magnitude.shape[1:], generator=generator) * (2 * torch.pi)
    spectrum = magnitude * torch.polar(torch.ones(()), angle)
    before = torch.zeros_like(spectrum)
    for _ in range(GRIFFIN_LIM_STEPS):
        found = stft_frames(overlap_add(spectrum, window, hop), window, hop)
        sped = found + MOMENTUM * (found - before)
        before = found
        spectrum = magnitude * (sped / sped.abs().clamp_min(1e-12))
    return overlap_add(spectrum, window, hop)


def overlap_add(spectrum: Tensor, window: Tensor, hop: int) -> Tensor:
    """The least-squares inverse of `stft_frames`: `[batch, frames, bins]` → `[batch, frames × hop]`."""
    pieces = torch.fft.irfft(spectrum, n=len(window)) * (window * (window.sum() / 2))
    weight = _add(window.square().expand(1, spectrum.shape[1], -1), hop)
    margin = len(window) - hop
    wave = _add(pieces, hop) / weight.clamp_min(1e-3)
    return wave[:, margin // 2 : margin // 2 + spectrum.shape[1] * hop]


def _add(pieces: Tensor, hop: int) -> Tensor:
    """Adds `[batch, frames, length]` at steps of `hop`. Cut into columns of one hop, it is a few shifted sums."""
    batch, frames, length = pieces.shape
    columns = -(-length // hop)
    pieces = torch.nn.functional.pad(pieces, (0, columns * hop - length)).view(batch, frames, columns, hop)
    total = pieces.new_zeros(batch, frames + columns - 1, hop)
    for column in range(columns):
        total[:, column : column + frames] += pieces[:, :, column]
    return total.view(batch, -1)
