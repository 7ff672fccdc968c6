"""WebDataset: tar files whose members of one name, but for the suffix, are one sample: audio, and .json or .txt."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from braceexpand import braceexpand

from data import storage
from data.caption_files import clean
from data.config import DataConfig
from data.sources.base import CLOUD_SUFFIXES, Item, Skipped
from data.sources.rows import description
from data.storage import Entry
from model.artifact import fingerprint
from model.errors import UserError

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""Name and suffix of a member: as the webdataset package has it, a name ends at its first dot."""
BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Sample:
    """The members of one name."""

    key: str
    audio: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class TarPart:
    """One tar file."""

    location: str
    name: str

    def items(self) -> Iterator[Item | Skipped]:
        try:
            with storage.opened(self.location) as file:
                try:
                    with tarfile.open(fileobj=io.BufferedReader(file), mode="r:") as tar:
                        yield from map(self._item, self._samples(tar))
                        if problem := _stops_early(tar):
                            yield Skipped(self.name, "damaged", problem)
                except tarfile.TarError as error:
                    yield Skipped(self.name, "damaged", f"it cannot be read as a tar to its end: {error}")
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            yield Skipped(self.name, reason, error.strerror or str(error))

    def _samples(self, tar: tarfile.TarFile) -> Iterator[_Sample]:
        sample = None
        try:
            for member in tar:
                found = MEMBER.fullmatch(member.name)
                if not found or not member.isreg() or member.issparse():
                    continue
                if sample is None or sample.key != found[1]:
                    if sample:
                        yield sample
                    sample = _Sample(found[1])
                self._add(sample, f".{found[2].lower().rpartition('.')[2]}", member, tar)
        except tarfile.TarError:
            if sample:  # all of it came before the damage
                yield sample
            raise
        if sample:
            yield sample

    def _add(self, sample: _Sample, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        if suffix in CLOUD_SUFFIXES and sample.audio is None:
            sample.audio = storage.stretch(self.location, member.offset_data, member.size)
        elif suffix in (".json", ".txt"):
            content = tar.extractfile(member)
            assert content is not None
            try:
                sample.row |= _row(suffix, content.read())
            except ValueError as error:
                sample.problem = f"its {suffix[1:]} cannot be used ({error})"

    def _item(self, sample: _Sample) -> Item | Skipped:
        name = f"{self.name}/{sample.key}"
        if sample.problem:
            return Skipped(name, "malformed row", sample.problem)
        if sample.audio is None:
            return Skipped(name, "no audio", "the tar has no audio member of this name")
        try:
            return Item(name, sample.audio, **description(sample.row))
        except ValueError as error:
            return Skipped(name, "malformed row", str(error))


class WebDatasetSource:
    """Tar files: one, those of a folder, or those a pattern with braces names."""

    parts_a_process = 1

    def __init__(self, config: DataConfig, entries: list[Entry]) -> None:
        assert config.audio is not None
        self.place = config.audio
        if entries:
            self._parts = [TarPart(entry.location, entry.name) for entry in entries if entry.name.endswith(".tar")]
            if not self._parts:
                raise UserError(f"data.audio: {self.place} holds no .tar files.")
        else:
            folder = storage.parent(self.place.partition("{")[0])
            self._parts = [TarPart(tar, tar[len(folder) :].lstrip("/")) for tar in _expanded(self.place)]

    def parts(self) -> Sequence[TarPart]:
        return self._parts

    def skipped(self) -> list[Skipped]:
        return []

    def fingerprint(self) -> str:
        return fingerprint(self.place, storage.tags(part.location for part in self._parts))


def _expanded(pattern: str) -> list[str]:
    try:
        return list(dict.fromkeys(braceexpand(pattern, escape=False)))
    except ValueError:
        raise UserError(f"data.audio: {pattern} is not a pattern such as shards-{{000..010}}.tar.") from None


def _row(suffix: str, content: bytes) -> dict[str, Any]:
    if suffix == ".txt":
        lines = content.decode("utf-8-sig").splitlines()
        return {"captions": list(filter(None, map(clean, lines)))}
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    return row


def _stops_early(tar: tarfile.TarFile) -> str | None:
    """What is wrong where the tar's last readable member is not its end: tarfile takes a damaged header for one."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return f"nothing beyond byte {tar.offset} can be read" if tar.fileobj.read(BLOCK).strip(b"\0") else None
