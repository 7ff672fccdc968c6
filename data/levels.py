"""How loud audio is, and whether it can be used at that."""

from __future__ import annotations

import numpy as np

from data.decoders import AudioError

INVALID, SILENT, CLIPPED = "invalid samples", "silent", "clipped"
LOUDEST = 16.0
"""Samples beyond this are no waveform in [-1, 1]: a float file holds integers, or garbage."""
FULL_SCALE = 0.999
"""Samples at or beyond this are clipped, or may be."""
LOUDNESS_SECONDS = 0.05


def check_samples(samples: np.ndarray) -> None:
    """Raises AudioError ("invalid samples") where some are not finite, or far above full scale."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak <= LOUDEST:  # true for NaN as well
        raise AudioError(INVALID, f"its largest sample is {peak:g}, where 1 is full scale")


def check_silence(wave: np.ndarray, rate: int, silence_db: float) -> None:
    """Raises AudioError ("silent") when the loudest 50 ms of a mono `wave`, without their mean, stay below `silence_db`
    (dB full scale)."""
    window = min(len(wave), max(1, round(LOUDNESS_SECONDS * rate)))
    windows = wave[: len(wave) // window * window].reshape(-1, window) if window else np.zeros((1, 1))
    level = 20 * np.log10(max(float(windows.std(axis=1).max()), 1e-10))
    if level < silence_db:
        raise AudioError(SILENT, f"its loudest moment is at {level:.0f} dB of full scale")


def check_clipping(samples: np.ndarray, most: float) -> None:
    """Raises AudioError ("clipped") where more than the share `most` of the samples of a channel is at full scale."""
    share = float((np.abs(samples) >= FULL_SCALE).mean(axis=0).max(initial=0.0))
    if share > most:
        raise AudioError(CLIPPED, f"{100 * share:.1f} % of its samples are at full scale")


def loudness_gain(wave: np.ndarray, rate: int, target: float, peak: float) -> float:
    """The factor that brings a mono `wave` to `target` LUFS (integrated loudness, ITU-R BS.1770-4, by pyloudnorm), at
    most the one that brings `peak` to full scale.

    It is 1 for what has no loudness: less than the 0.4 s that one block takes, or all below -70 LUFS.
    """
    import pyloudnorm  # brings SciPy; few corpora ask for it

    meter = pyloudnorm.Meter(rate)
    if len(wave) < meter.block_size * rate:
        return 1.0
    with np.errstate(divide="ignore"):
        loudness = meter.integrated_loudness(wave.astype(np.float64))
    if not np.isfinite(loudness):
        return 1.0
    return float(min(10 ** ((target - loudness) / 20), 1 / peak))
