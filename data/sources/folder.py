"""A folder of audio files, here or in a bucket, with its subfolders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data import storage
from data.caption_files import Captions, captions_file, clean
from data.cloud import is_remote
from data.config import DataConfig
from data.sources.base import AUDIO_SUFFIXES, CLOUD_SUFFIXES, Item, Skipped
from data.storage import Entry
from model.artifact import fingerprint

TEXT_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".json", ".md", ".yaml", ".yml"})


def suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


@dataclass(frozen=True)
class FilePart:
    """One file. `words` is where its NAME.txt is, if it has no other captions."""

    name: str
    location: str
    captions: tuple[str, ...]
    words: str | None

    def items(self) -> Iterator[Item]:
        captions = self.captions
        notes: tuple[tuple[str, str], ...] = ()
        if self.words:
            try:
                lines = storage.read_bytes(self.words).decode("utf-8-sig").splitlines()
                captions = tuple(dict.fromkeys(filter(None, map(clean, lines))))
            except UnicodeDecodeError:
                notes = (("captions not readable", "NAME.txt is not UTF-8 text"),)
            except OSError as error:
                notes = (("captions not readable", f"NAME.txt: {error.strerror}"),)
        expected = suffix(self.name) in AUDIO_SUFFIXES
        yield Item(self.name, self.location, captions, expected=expected, notes=notes)


class FolderSource:
    """The files of a folder that may hold audio, whatever their names, with captions from a file or beside them."""

    parts_a_process = 32

    def __init__(self, config: DataConfig, entries: list[Entry]) -> None:
        assert config.audio is not None
        self.place = config.audio
        self.entries = entries
        self.captions_file = captions_file(config.captions, self.place, [entry.name for entry in entries])
        self._skipped: list[Skipped] = []

    def parts(self) -> Sequence[FilePart]:
        files = [entry for entry in self.entries if self._may_hold_audio(entry)]
        captions = Captions(self.captions_file, self.place, {entry.name: entry.location for entry in files})
        self._skipped = [
            Skipped(name, "caption names a missing file", f"line {line} of the captions file")
            for name, line in captions.missing
        ]
        self._skipped += [Skipped(*row) for row in captions.malformed]
        texts = {entry.name: entry.location for entry in self.entries if suffix(entry.name) == ".txt"}
        return [
            FilePart(
                entry.name,
                entry.location,
                given := captions.of(entry.name),
                None if given else texts.get(str(PurePosixPath(entry.name).with_suffix(".txt"))),
            )
            for entry in files
        ]

    def skipped(self) -> list[Skipped]:
        return self._skipped

    def fingerprint(self) -> str:
        captions = storage.tags([self.captions_file]) if self.captions_file else None
        return fingerprint(self.place, captions, [(ascii(entry.name), entry.size, entry.tag) for entry in self.entries])

    def _may_hold_audio(self, entry: Entry) -> bool:
        if is_remote(self.place):
            return suffix(entry.name) in CLOUD_SUFFIXES
        return suffix(entry.name) not in TEXT_SUFFIXES
