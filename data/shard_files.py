"""Looking at token shards one by one, wherever they lie, without joining any job: for `stretto inspect` and samples.

The third file of the seam to mosaicml-streaming, for what neither trains nor writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash

from data.token_corpus import INDEX, stored_bytes
from model.errors import UserError


@dataclass(frozen=True)
class ShardFile:
    """One shard of a split, as the index of `folder` describes it; at `remote` where that is given."""

    folder: Path
    entry: dict[str, Any]
    remote: str | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """Name, bytes and hashes of the file as it lies there, compressed or not."""
        return self.entry["zip_data"] or self.entry["raw_data"]

    @property
    def place(self) -> str:
        return f"{self.remote or self.folder}/{self.stored['basename']}"

    def records(self) -> Iterator[dict[str, Any]]:
        """Its records. Raises UserError that names the shard where it is missing or not what the index says."""
        with tempfile.TemporaryDirectory() as scratch:
            content = self._content()
            if self.entry["zip_data"]:
                content = decompress(self.entry["compression"], content)
            (Path(scratch) / self.entry["raw_data"]["basename"]).write_bytes(content)
            yield from reader_from_json(scratch, None, self.entry)

    def _content(self) -> bytes:
        try:
            content = stored_bytes(self.place)
        except FileNotFoundError:
            raise UserError(f"{self.place} is missing.") from None
        if len(content) != self.stored["bytes"]:
            raise UserError(f"{self.place} has {len(content)} bytes, {self.stored['bytes']} expected.")
        for name, value in self.stored["hashes"].items():
            if get_hash(name, content) != value:
                raise UserError(f"{self.place} has changed: its {name} is not the one in the index.")
        return content


def shard_files(folder: Path, remote: str | None = None) -> list[ShardFile]:
    """The shards of a split in the order of its index. Raises UserError where the index does not read."""
    try:
        entries = json.loads((folder / INDEX).read_text())["shards"]
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{folder / INDEX} is missing or damaged.") from None
    return [ShardFile(folder, entry, remote) for entry in entries]
