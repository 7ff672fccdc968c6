"""What the codes in token shards are like: how many, which are used, and how evenly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.progress import Progress
from data.shard_files import shard_files
from model import artifact
from model.errors import UserError
from model.fields import TokenField


@dataclass
class FieldStatistics:
    """The codes of one field in one split."""

    counts: np.ndarray
    """How often each code stands, int64 `[quantizers, codebook_size]`."""
    outside: int = 0
    """Codes that are not in the codebook."""
    frames: int = 0
    shortest: int | None = None
    longest: int = 0
    """Frames of the shortest and of the longest record."""

    @classmethod
    def of(cls, token_field: TokenField) -> FieldStatistics:
        return cls(np.zeros((token_field.quantizers, token_field.codebook_size), np.int64))

    def add(self, codes: np.ndarray) -> None:
        """Counts the codes of a record: `[frames, quantizers]`, or `[frames]` of one quantizer."""
        size = self.counts.shape[1]
        for quantizer, column in enumerate(codes.reshape(len(codes), -1).T):
            found = np.bincount(column, minlength=size)
            self.counts[quantizer] += found[:size]
            self.outside += int(found[size:].sum())
        self.frames += len(codes)
        self.shortest = len(codes) if self.shortest is None else min(self.shortest, len(codes))
        self.longest = max(self.longest, len(codes))

    def used(self) -> np.ndarray:
        """Share of the codes of each quantizer that occur, float64 `[quantizers]`."""
        return (self.counts > 0).mean(1)

    def perplexity(self) -> np.ndarray:
        """As many codes, used evenly, would say as much: the exponential of the entropy, float64 `[quantizers]`."""
        share = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(1))


@dataclass
class SplitStatistics:
    """One split of a token artifact."""

    fields: dict[str, FieldStatistics]
    records: int = 0
    captioned: int = 0
    problems: list[str] = field(default_factory=list)
    """Shards that cannot be read, or are not what their index says."""


def token_statistics(tokens: artifact.Artifact, split: str, progress: Progress | None = None) -> SplitStatistics:
    """Reads every shard of `split`, from its remote where it has one, checking each against the hashes in the index."""
    fields = {name: TokenField.from_json(value) for name, value in tokens.info["fields"].items()}
    found = SplitStatistics({name: FieldStatistics.of(value) for name, value in fields.items()})
    remote = tokens.info.get("remote")
    shards = shard_files(tokens.path / split, remote and f"{remote}/{split}")
    for number, shard in enumerate(shards, start=1):
        try:
            for record in shard.records():
                _count(record, found)
        except UserError as error:
            found.problems.append(str(error))
        if progress:
            progress.update(number, len(shards), f"reading {split}")
    return found


def find_record(tokens: artifact.Artifact, wanted: str) -> dict[str, Any]:
    """The record with the id `wanted`, or number `wanted` counted from 0, training before validation.

    Raises UserError where there is none.
    """
    remote, number = tokens.info.get("remote"), 0
    for split in tokens.info["records"]:
        for shard in shard_files(tokens.path / split, remote and f"{remote}/{split}"):
            if wanted.isdigit() and not number <= int(wanted) < number + shard.entry["samples"]:
                number += shard.entry["samples"]
                continue
            for record in shard.records():
                if record["id"] == wanted or (wanted.isdigit() and number == int(wanted)):
                    return record
                number += 1
    total = sum(tokens.info["records"].values())
    raise UserError(f"{tokens.path} has no record {wanted!r}: name an id, or a number from 0 to {total - 1}.")


def _count(record: dict[str, Any], found: SplitStatistics) -> None:
    found.records += 1
    found.captioned += record["captions"] != "[]"
    for name, statistics in found.fields.items():
        statistics.add(record[name])
