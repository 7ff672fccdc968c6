"""Typed configuration of the corpus and of how it is cut. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from model.config import Config


class DataConfig(Config):
    """Where the audio comes from."""

    audio: str | None = None
    """Folder of audio files; the built-in corpus when not given."""
    captions: str | None = None
    """captions.jsonl or .csv; found in the audio folder by itself when it is there."""
    clips: PositiveInt = 2_040
    """Clips of the built-in corpus."""
    clip_seconds: PositiveFloat = 5.0
    sample_rate: PositiveInt = 16_000
    """Rate of the built-in corpus."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of source files kept for validation."""
    silence_db: float = Field(-60.0, le=0)
    """Clips whose loudest 50 ms stay below this level (dB full scale) are skipped as silent."""
