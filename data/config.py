"""Typed configuration of the corpus and of how it is cut. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data.steps.config import StepConfig
from model.config import Config
from model.fields import TokenField, common_period


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
    shortest_seconds: PositiveFloat | None = None
    """With it, what is left at the end of a file, or a whole short file, of at least this length is a clip of its own
    length, without silence. The stages train on it, and with train.packing in windows as short as it is; the codec,
    the joint embedding and the quantizers are fitted on clips of clip_seconds alone."""
    sample_rate: PositiveInt = 16_000
    """Rate of the built-in corpus."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the clips kept for validation: all clips of some source files, or the end of the only one."""
    silence_db: float = Field(-60.0, le=0)
    """Clips whose loudest 50 ms stay below this level (dB full scale) are skipped as silent."""
    ranks: PositiveInt = 1
    """Processes (one GPU each where there are GPUs) that fit the quantizers and make the tokens together."""
    workers: NonNegativeInt = 2
    """Processes beside each of them that decode the audio ahead."""


class TokensConfig(Config):
    """How the token shards are made and where they are kept."""

    shard_seconds: PositiveFloat = 3600.0
    """Audio in one shard; a small corpus has shorter ones. What a rank loses at most when it is killed."""
    batch_seconds: PositiveFloat = 80.0
    """Audio encoded at a time."""
    compression: str | None = Field(None, pattern=r"^(zstd|gz|br|bz2|snappy)(:\d+)?$")
    """How shards are compressed, such as zstd or zstd:9; not at all when not given."""
    steps: list[StepConfig] = Field([])
    """What is done to every clip beside its encoding, in this order."""
    upload: str | None = Field(None, pattern=r"^(s3|gs)://[^/]+/.+")
    """`s3://bucket/prefix` or `gs://bucket/prefix` the shards are kept at in place of the run folder."""


def aligned_seconds(seconds: float, fields: Sequence[TokenField]) -> float:
    """How much of a short clip of `seconds` is used: the longest time that is a whole number of frames of each of
    `fields`, so that all of them end together."""
    period = common_period(list(fields))
    return float(Fraction(seconds).limit_denominator(1_000_000) // period * period)
