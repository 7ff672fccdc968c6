"""A manifest: a table with a row for each piece of audio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data import storage
from data.caption_files import FILE_COLUMNS
from data.config import DataConfig
from data.sources.base import Item, Skipped
from data.sources.rows import description, numbered
from data.tables import TABLES, column, rows
from model.artifact import fingerprint
from model.errors import UserError

MANIFESTS = (".jsonl", *TABLES)
MALFORMED = "malformed row"


@dataclass(frozen=True)
class RowPart:
    """One good row."""

    item: Item

    @property
    def name(self) -> str:
        return self.item.name

    def items(self) -> Iterator[Item]:
        yield self.item


class ManifestSource:
    """The rows of a JSONL, CSV or TSV file. Paths in it are seen from its folder, unless they are absolute or
    addresses.

    A row that is malformed is left out with its line and reason; a manifest without any good row is refused.
    """

    parts_a_process = 32

    def __init__(self, config: DataConfig) -> None:
        assert config.audio is not None
        self.place = config.audio
        self._skipped: list[Skipped] = []

    def parts(self) -> Sequence[RowPart]:
        items = list(self._items())
        if not items:
            raise UserError(_no_row(self.place, self._skipped))
        return [RowPart(item) for item in items]

    def skipped(self) -> list[Skipped]:
        return self._skipped

    def fingerprint(self) -> str:
        items = list(self._items())
        return fingerprint(self.place, storage.tags([self.place, *(item.path for item in items)]))

    def _items(self) -> Iterator[Item]:
        """The good rows; the others are noted."""
        self._skipped, good = [], []
        folder, file = storage.parent(self.place), self.place.rpartition("/")[2]
        try:
            for line, row in rows(self.place):
                name = f"{file}:{line}"
                try:
                    if isinstance(row, str):
                        raise ValueError(row)
                    name, audio, rest = _named(row)
                    good.append(Item(name, storage.join(folder, audio), **description(rest)))
                except ValueError as error:
                    self._skipped.append(Skipped(name, MALFORMED, f"line {line}: {error}"))
        except OSError as error:
            raise UserError(f"data.audio: {self.place} cannot be read: {error.strerror}.") from None
        except UnicodeError:
            raise UserError(f"data.audio: {self.place} is not a text file: save it as UTF-8.") from None
        if self.place.lower().endswith(TABLES):
            numbered([item.columns for item in good])
        yield from good


def _named(row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """The name of the audio of a row, where it is, and the rest of the row."""
    key = column(row, FILE_COLUMNS)
    if key is None:
        raise ValueError(f"it has no column for the audio: {', '.join(FILE_COLUMNS)}")
    audio = row[key]
    if not isinstance(audio, str) or not audio.strip() or "\0" in audio:
        raise ValueError(f"its {key.strip()} is not the name of a file")
    audio = audio.strip()
    if audio.startswith(("http://", "https://")):
        raise ValueError("it names an address: `stretto collect` fetches these")
    return audio, audio, {name: value for name, value in row.items() if name != key}


def _no_row(place: str, skipped: list[Skipped]) -> str:
    if not skipped:
        return f'data.audio: {place} has no rows. Each needs at least a path, as in {{"path": "a.wav"}}.'
    first = skipped[0]
    return f"data.audio: {place} has no row that can be used ({len(skipped)} malformed). {first.detail}."
