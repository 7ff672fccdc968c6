"""MDS shards of raw audio, read in place: where each record's audio lies, and its other columns.

With `data.shards` and what belongs to it, this is the seam to mosaicml-streaming, which is imported here to unpack
compressed shards. Its readers are not used: its datasets join a distributed job or keep every shard on the disk, and
none says where in a shard a column lies, which is what reading one clip takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data import storage
from model.errors import UserError

INDEX = "index.json"
AUDIO_COLUMNS = ("audio", "wav", "flac", "mp3", "ogg", "opus", "m4a", "bytes")
TEXTS: dict[str, Callable[[str], Any]] = {"str": str, "json": json.loads, "str_int": int, "str_float": float}
NUMBER = re.compile(r"int|u?int(8|16|32|64)|float(16|32|64)")
"""With TEXTS the encodings that are read. Not among them: pickles, which can run code, and arrays."""


class DamagedShardError(Exception):
    """A shard is not what its index says."""


@dataclass(frozen=True)
class RawShard:
    """A shard as the index describes it."""

    location: str
    name: str
    samples: int
    size: int
    """Bytes of it, not compressed."""
    columns: tuple[tuple[str, str, int | None], ...]
    """Name, encoding and size (None where it differs) of each column."""
    audio: str

    def records(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Scalar columns, and offset and size of the audio, of each record. Raises OSError and DamagedShardError."""
        with storage.opened(self.location) as file:
            if file.seek(0, 2) != self.size:
                raise DamagedShardError(f"it has {file.seek(0, 2):,} bytes, its index says {self.size:,}")
            file.seek(0)
            numbers = np.frombuffer(file.read(4 * (self.samples + 2)), np.uint32).astype(int)
            if len(numbers) != self.samples + 2 or numbers[0] != self.samples:
                raise DamagedShardError(f"it does not hold the {self.samples} records its index says")
            for begin, end in pairwise(numbers[1:]):
                if not begin < end <= self.size:
                    raise DamagedShardError(f"its record at byte {begin} cannot be")
                yield self._record(file, int(begin), int(end))

    def _record(self, file: Any, begin: int, end: int) -> tuple[dict[str, Any], int, int]:
        file.seek(begin)
        varying = sum(not size for _, _, size in self.columns)
        lengths = iter(np.frombuffer(file.read(4 * varying), np.uint32).astype(int).tolist())
        at, row, audio = begin + 4 * varying, {}, (0, 0)
        for name, encoding, size in self.columns:
            length = size or next(lengths)
            if at + length > end:
                raise DamagedShardError(f"its record at byte {begin} cannot be")
            if name == self.audio:
                audio = (at, length)
            elif encoding in TEXTS or NUMBER.fullmatch(encoding):
                file.seek(at)
                try:
                    row[name] = _scalar(encoding, file.read(length))
                except ValueError as error:
                    raise DamagedShardError(f"column {name} of its record at byte {begin}: {error}") from None
            at += length
        return row, *audio


def read_index(folder: str) -> list[RawShard]:
    """The shards of a folder of MDS. Raises UserError where there is no such index, or no column of audio in it."""
    path = storage.join(folder, INDEX)
    try:
        index = json.loads(storage.read_bytes(path))
        return [_shard(folder, entry) for entry in index["shards"]]
    except OSError as error:
        raise UserError(f"data.audio: {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.audio: {path} is not the index of MDS shards ({error!r}).") from None


def unpacked(data: bytes, suffix: str) -> bytes:
    """What a compressed shard holds. Raises OSError where it is damaged."""
    from streaming.base.compression import decompress, get_compression_extension, get_compressions

    names = {get_compression_extension(name): name for name in get_compressions() if ":" not in name}
    try:
        return decompress(names[suffix], data)
    except Exception as error:  # noqa: BLE001 - five libraries, each with exceptions of its own
        raise OSError(5, f"it cannot be unpacked ({error})") from None


def _shard(folder: str, entry: dict[str, Any]) -> RawShard:
    if entry["format"] != "mds":
        raise ValueError(f"a shard has format {entry['format']}")
    columns = tuple(zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True))
    audio = next((name for name in AUDIO_COLUMNS if (name, "bytes") in [column[:2] for column in columns]), None)
    if audio is None:
        raise UserError(
            f"data.audio: {folder} has no column of bytes called {', '.join(AUDIO_COLUMNS)}: one of them is needed."
        )
    name = (entry["zip_data"] or entry["raw_data"])["basename"]
    if "/" in name or name.startswith("."):
        raise ValueError(f"a shard is called {name}")
    return RawShard(
        storage.join(folder, name), name, int(entry["samples"]), int(entry["raw_data"]["bytes"]), columns, audio
    )


def _scalar(encoding: str, data: bytes) -> Any:
    """Raises ValueError where `data` is none."""
    if NUMBER.fullmatch(encoding):
        return np.frombuffer(data, "int64" if encoding == "int" else encoding).item()
    return TEXTS[encoding](data.decode())
