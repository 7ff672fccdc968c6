"""Typed configuration of the corpus and of how it is cut. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from data.steps.config import StepConfig
from model.config import Config
from model.fields import TokenField, common_period

HIGHEST_LEVELS = {"zstd": 22, "br": 11, "gz": 9, "bz2": 9}
"""Of the ways to compress a shard; all begin at 1."""


def _address(value: str) -> str:
    if not re.fullmatch(r"(s3|gs)://[^/]+(/.*)?", value):
        raise ValueError("must be an address such as s3://bucket/prefix or gs://bucket/prefix")
    return value.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]
"""A place in cloud storage."""
Downmix = Literal["mix", "left", "right", "loudest"]


class DataConfig(Config):
    """Where the audio comes from."""

    audio: str | None = None
    """Folder of audio files, searched with its subfolders; a manifest (JSONL, CSV or TSV); a folder of MDS; WebDataset
    tars (a file, a folder of them, or a pattern with braces). Each may be an s3:// or gs:// address. The built-in
    corpus when not given."""
    format: Literal["auto", "folder", "manifest", "mds", "webdataset"] = "auto"
    """Which of these it is, where what is found does not say."""
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
    """Share kept for validation: of the groups of data.split_by for a user's own audio, else of the clips."""
    test: float = Field(0.0, ge=0, lt=1)
    """Share of the groups kept for the evaluation at the end alone."""
    split_by: str | None = None
    """Column of a manifest, such as artist: all that has one value of it goes to one split. Without it, all clips of
    one source file do. A column `split` wins over both."""
    silence_db: float = Field(-60.0, le=0)
    """Clips whose loudest 50 ms stay below this level (dB full scale) are skipped as silent."""
    most_clipped: float | None = Field(0.05, ge=0, lt=1)
    """Clips with more than this share of samples at full scale are skipped as clipped; null takes all. Loud masters
    have well below 1 %."""
    duplicates: Literal["skip", "keep"] = "skip"
    """What to do with a clip whose decoded samples an earlier one has, in whichever container."""
    channels: Downmix = "mix"
    """How mono is made of several channels: their mean (mix), the left one, the right one, or the loudest of each
    clip. An encoder that takes two channels gets the first two as they are."""
    loudness: float | None = Field(None, ge=-70, le=0)
    """Loudness that every clip is brought to (LUFS, ITU-R BS.1770), as far as no sample clips; null leaves it."""
    tag_captions: NonNegativeInt = 3
    """Captions made from the tags of audio that has none: so many of each; 0 makes none."""
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
    compression: str | None = None
    """How shards are compressed, such as zstd or zstd:9; not at all when not given."""
    steps: list[StepConfig] = Field([])
    """What is done to every clip beside its encoding, in this order."""
    upload: Address | None = None
    """`s3://bucket/prefix` or `gs://bucket/prefix` the shards are kept at in place of the run folder."""

    @field_validator("compression")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        name, colon, level = (value or "").partition(":")
        if value is not None and not (
            name in HIGHEST_LEVELS and (not colon or (level.isdigit() and 1 <= int(level) <= HIGHEST_LEVELS[name]))
        ):
            known = ", ".join(f"{name} (levels to {highest})" for name, highest in HIGHEST_LEVELS.items())
            raise ValueError(f"must be one of {known}, such as zstd or zstd:9")
        return value


def aligned_seconds(seconds: float, fields: Sequence[TokenField]) -> float:
    """How much of a short clip of `seconds` is used: the longest time that is a whole number of frames of each of
    `fields`, so that all of them end together."""
    period = common_period(list(fields))
    return float(Fraction(seconds).limit_denominator(1_000_000) // period * period)
