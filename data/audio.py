"""Reading audio files: any rate, any number of channels, by content and not by name, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr


class AudioError(Exception):
    """A file, or a part of one, cannot be used. `reason` is the kind of fault, `detail` says it in words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def resample(wave: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def read_mono(path: Path, start: float, seconds: float, sample_rate: int) -> np.ndarray:
    with soundfile.SoundFile(path) as file:
        file.seek(round(start * file.samplerate))
        wave = file.read(round(seconds * file.samplerate), dtype="float32", always_2d=True).mean(axis=1)
        wave = resample(wave, file.samplerate, sample_rate)
    out = np.zeros(round(seconds * sample_rate), dtype=np.float32)
    out[: len(wave)] = wave[: len(out)]
    return np.clip(out, -1.0, 1.0)
