"""Short-time spectra on the token clock, shared by the built-in encoders."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_FRAMES = 4096
"""Spectra held at a time, of each wave."""


def stft_frames(wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """Complex spectra `[batch, samples // hop, len(window) // 2 + 1]` of `wave` `[batch, samples]`.

    Frame t is centred on the middle of [t × hop, (t + 1) × hop): the wave is extended by reflection by half of what
    the window is longer than the hop. A full-scale sine has magnitude near 1, whatever the window.
    """
    if wave.shape[-1] < hop:
        return wave.new_zeros(len(wave), 0, len(window) // 2 + 1, dtype=torch.complex64)
    return _spectra(_pieces(wave, window, hop), window)


def map_spectra(function: Callable[[Tensor], Tensor], wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """`function(stft_frames(wave, window, hop))` for one that takes each frame by itself, in bounded memory."""
    if wave.shape[-1] < hop:
        return function(stft_frames(wave, window, hop))
    parts = _pieces(wave, window, hop).split(BLOCK_FRAMES, 1)
    return torch.cat([function(_spectra(part, window)) for part in parts], 1)


def _spectra(pieces: Tensor, window: Tensor) -> Tensor:
    return torch.fft.rfft(pieces * (window * (2 / window.sum())))


def _pieces(wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """The samples under each frame's window, `[batch, samples // hop, len(window)]`: a view."""
    margin = len(window) - hop
    wave = wave[..., : wave.shape[-1] // hop * hop]
    if wave.shape[-1] <= margin:  # too short to reflect
        wave = F.pad(wave, (margin // 2, margin - margin // 2))
    else:
        wave = F.pad(wave[:, None], (margin // 2, margin - margin // 2), mode="reflect")[:, 0]
    return wave.unfold(-1, len(window), hop)


def mel_filters(bands: int, sample_rate: int, n_fft: int, low_hz: float = 30.0) -> Tensor:
    """Triangular filters `[n_fft // 2 + 1, bands]`, equally wide on the mel scale 2595 log10(1 + f / 700) and each at
    least one bin to either side, so that no band of a fine scale is empty. Peaks are 1.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    low = 2595 * math.log10(1 + low_hz / 700)
    edges = 700 * (10 ** (torch.linspace(low, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    bin_hz = sample_rate / n_fft
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * bin_hz
    centre = edges[1:-1]
    rise = (centre - edges[:-2]).clamp_min(bin_hz)
    fall = (edges[2:] - centre).clamp_min(bin_hz)
    slope = torch.where(frequencies < centre, (frequencies - centre) / rise, (centre - frequencies) / fall)
    return (1 + slope).clamp_min(0).float()


class LogMel:
    """Natural log of mel power, `[batch, samples]` → `[batch, samples // hop, bands]`, never below ln(floor)."""

    def __init__(self, bands: int, sample_rate: int, window: int, hop: int, floor: float) -> None:
        self.filters = mel_filters(bands, sample_rate, window)
        self.window = torch.hann_window(window)
        self.hop = hop
        self.floor = floor

    def __call__(self, wave: Tensor) -> Tensor:
        return map_spectra(self._of, wave, self.window, self.hop)

    def _of(self, spectrum: Tensor) -> Tensor:
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.filters).add_(self.floor).log_()


def window_length(sample_rate: int, seconds: float) -> int:
    """The power of two nearest to `seconds` of samples: a length the FFT is quick at."""
    return 2 ** round(math.log2(seconds * sample_rate))
