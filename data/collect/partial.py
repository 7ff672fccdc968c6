"""A file that is not whole yet, and what is needed to go on with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from model import artifact


@dataclass(frozen=True)
class Note:
    """What a server said of a file: `validator` (a strong ETag, or when it changed) tells whether it is still the same,
    `total` its bytes, where it says so. A file without a validator cannot be gone on with."""

    validator: str | None
    total: int | None
    suffix: str


class Partial:
    """The first bytes of a file at `path`, with a note beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note = path.with_name(f"{path.name}.json")

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def note(self) -> Note | None:
        """The note of a file that can be gone on with; of any other, what there is of it is removed."""
        try:
            note = Note(**json.loads(self._note.read_text()))
        except (OSError, ValueError, TypeError):
            note = None
        if note is not None and note.validator and self.bytes and self.bytes <= (note.total or self.bytes):
            return note
        self.drop()
        return None

    def begin(self, note: Note) -> None:
        """Starts the file afresh."""
        self.drop()
        artifact.write_json(self._note, asdict(note))

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        """The whole file takes its name, synced."""
        artifact.sync(self.path)
        self.path.replace(target)
        artifact.sync(target.parent)
        self._note.unlink(missing_ok=True)
