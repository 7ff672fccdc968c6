"""Typed configuration of the corpus and of how it is cut. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from model.config import Config


class DataConfig(Config):
    """Where the audio comes from."""

    audio: str | None = None
    """Folder of audio files, searched with its subfolders; the built-in corpus when not given."""
    captions: str | None = None
    """File of captions, JSON lines or CSV, each row with a file name and its caption (keys file, path, audio or
    file_name; caption, captions or text). Not needed for captions.jsonl or a CSV at the top of the audio folder, nor
    for a NAME.txt beside each file, whose lines are its captions."""
    clips: PositiveInt = 2_040
    """Clips of the built-in corpus."""
    clip_seconds: PositiveFloat = 5.0
    """Files are cut into clips of this length from their start. What is left at the end of a file, or a whole short
    file, is a clip as well when it has at least 90 % of the length; the rest of that clip is silence."""
    sample_rate: PositiveInt = 16_000
    """Rate of the built-in corpus."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the clips kept for validation: all clips of some source files, or the end of the only one."""
    silence_db: float = Field(-60.0, le=0)
    """Clips whose loudest 50 ms stay below this level (dB full scale) are skipped as silent."""
