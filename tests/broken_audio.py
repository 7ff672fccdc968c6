"""Sounds to be broken, and what indexing makes of a folder of them, shared by the tests of broken sources."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data.config import DataConfig
from data.corpus import Clip, load_clip, read_clips, read_jsonl
from data.indexing import index_audio
from data.progress import Progress
from data.sources import sources_fingerprint

RATE = 16_000
SECONDS = 3.0


def noise(seed: int, seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).normal(size=round(seconds * rate))).clip(-0.9, 0.9)


def encoded(seed: int, kind: str = "WAV", rate: int = RATE, channels: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    wave = np.stack([noise(seed + 100 * channel, rate=rate) for channel in range(channels)], 1)
    soundfile.write(file, wave, rate, format=kind, **options)
    return file.getvalue()


def cut(content: bytes, share: float = 0.6) -> bytes:
    return content[: round(share * len(content))]


def index(folder: Path, audio: Path, **config: Any) -> tuple[list[Clip], list[dict], dict[str, Any]]:
    corpus = folder / "corpus"
    corpus.mkdir()
    settings = DataConfig(audio=str(audio), **{"clip_seconds": 1.0, **config})
    sources_fingerprint(settings)
    info = index_audio(corpus, settings, 0, Progress())
    clips = read_clips(corpus, short=True)
    for clip in clips:  # whatever is called usable is
        wave = load_clip(corpus, clip, 24_000)
        assert wave.shape == (24_000,)
        assert np.isfinite(wave).all()
        assert wave.std() > 0.01
        assert load_clip(corpus, clip, 8_000, channels=2).shape == (2, 8_000)
    return clips, read_jsonl(corpus / "skipped.jsonl"), info
