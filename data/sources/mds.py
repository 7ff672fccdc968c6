"""MDS shards of raw audio: the bytes of a file in one column, what is known of it in others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data import storage
from data.config import DataConfig
from data.raw_shards import INDEX, DamagedShardError, RawShard, read_index
from data.sources.base import Item, Skipped
from data.sources.rows import description
from model.artifact import fingerprint


@dataclass(frozen=True)
class ShardPart:
    """One shard."""

    shard: RawShard

    @property
    def name(self) -> str:
        return self.shard.name

    def items(self) -> Iterator[Item | Skipped]:
        try:
            for number, (row, offset, size) in enumerate(self.shard.records()):
                name = f"{self.name}/{number}"
                try:
                    yield Item(name, storage.stretch(self.shard.location, offset, size), **description(row))
                except ValueError as error:
                    yield Skipped(name, "malformed row", str(error))
        except DamagedShardError as error:
            yield Skipped(self.name, "damaged", str(error))
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            yield Skipped(self.name, reason, error.strerror or str(error))


class MdsSource:
    """The shards that an `index.json` lists."""

    parts_a_process = 1

    def __init__(self, config: DataConfig) -> None:
        assert config.audio is not None
        self.place = config.audio
        self._shards = read_index(self.place)

    def parts(self) -> Sequence[ShardPart]:
        return [ShardPart(shard) for shard in self._shards]

    def skipped(self) -> list[Skipped]:
        return []

    def fingerprint(self) -> str:
        files = [storage.join(self.place, INDEX), *(shard.location for shard in self._shards)]
        return fingerprint(self.place, storage.tags(files))
