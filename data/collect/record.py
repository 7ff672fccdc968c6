"""What a folder of collected audio holds, kept so that a kill at any moment loses nothing that is whole."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from data.collect.failure import Failure, Stopped
from data.collect.manifest import SHA256, URL, Manifest, Source
from data.collect.partial import Partial
from data.lock import LOCK
from model import artifact
from model.errors import UserError

ORIGIN = "collect.json"
JOURNAL = "collected.jsonl"
FAILED = "failed.jsonl"
MANIFEST = "manifest.jsonl"
AUDIO = "audio"
PARTIAL = "partial"


@dataclass(frozen=True)
class Stored:
    """A file that is there, `path` relative to the folder."""

    url: str
    path: str
    sha256: str
    bytes: int


class Record:
    """The journal of a folder: one line for each address whose file is whole. Safe for many threads.

    Use under the lock of the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises UserError when the folder is another manifest's, or holds other things."""
        self.folder = folder
        self._claim(manifest.path)
        self.files = {stored.url: stored for stored in self._read() if self._is_there(stored)}
        self._path_of = {stored.sha256: stored.path for stored in self.files.values()}
        self.settled = sum(map(self.has, manifest.sources))
        """Addresses that are here or have failed."""
        self.failures: Counter[str] = Counter()
        """Addresses by the reason why they are not here."""
        self.examples: dict[str, str] = {}
        """One of each."""
        (folder / AUDIO).mkdir(exist_ok=True)
        (folder / PARTIAL).mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._journal: TextIO = (folder / JOURNAL).open("a", encoding="utf-8")
        self._failed: TextIO = (folder / FAILED).open("w", encoding="utf-8")
        for fault in manifest.faults:
            self.fail(fault.url, [fault.line], fault.failure, 0)

    def has(self, source: Source) -> bool:
        stored = self.files.get(source.url)
        return stored is not None and source.sha256 in (None, stored.sha256)

    def partial(self, source: Source) -> Partial:
        return Partial(self.folder / PARTIAL / source.key)

    def keep(self, source: Source, partial: Partial, suffix: str) -> None:
        """Takes a whole file in. Contents that are there already, from another address, are not kept twice.

        Raises Failure when it is not what the manifest says.
        """
        digest = artifact.file_digest(partial.path)
        if source.sha256 not in (None, digest):
            raise Failure("sha256 differs", f"it has {digest}")
        size = partial.bytes
        with self._lock:
            if self._journal.closed:
                raise Stopped
            path = self._path_of.get(digest)
            if path is None:
                # Named by what it holds, so that no file is ever replaced, and no server chooses a name.
                path = f"{AUDIO}/{digest[:2]}/{digest[:32]}{suffix}"
                target = self.folder / path
                target.parent.mkdir(exist_ok=True)
                partial.finish(target)
            else:
                partial.drop()
            stored = Stored(source.url, path, digest, size)
            self._append(self._journal, asdict(stored))
            os.fsync(self._journal.fileno())
            self.files[source.url], self._path_of[digest] = stored, path
            self.settled += 1

    def fail(self, url: str, lines: list[int], failure: Failure, attempts: int) -> None:
        """Lists the rows at `lines` of the manifest, which name an address that was not fetched."""
        with self._lock:
            self.settled += 1
            self.failures[failure.reason] += 1
            self.examples.setdefault(failure.reason, f"{url or f'line {lines[0]}'}: {failure.detail}")
            for line in lines:
                row = {"url": url, "line": line, "reason": failure.reason, "detail": failure.detail}
                self._append(self._failed, {**row, "attempts": attempts})

    def write_manifest(self, sources: list[Source]) -> None:
        """Writes the manifest of what is there, one row for each row that names it, in their order."""
        rows = sorted(self._rows(sources), key=lambda row: row[0])
        partial = self.folder / f".{MANIFEST}{artifact.PARTIAL}"
        # A caption may hold half of a surrogate pair; JSON has an escape for it, and it is Python's.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        artifact.sync(partial)
        partial.replace(self.folder / MANIFEST)

    def close(self) -> None:
        with self._lock:
            self._journal.close()
            self._failed.close()
        with contextlib.suppress(OSError):  # it holds files to go on with
            (self.folder / PARTIAL).rmdir()

    def _rows(self, sources: list[Source]) -> Iterator[tuple[int, dict[str, Any]]]:
        first: dict[str, str] = {}
        for source in filter(self.has, sources):
            stored = self.files[source.url]
            original = first.setdefault(stored.sha256, source.url)
            here = {"path": stored.path, SHA256: stored.sha256, "bytes": stored.bytes, URL: source.url}
            if original != source.url:
                here["duplicate_of"] = original
            for row in source.rows:
                yield row.line, {**row.columns, **here}

    def _claim(self, manifest: Path) -> None:
        """Says whose the folder is. A manifest may grow under its name, or be the same under another."""
        own = manifest.resolve()
        if own.parent == self.folder.resolve() and own.name in (MANIFEST, FAILED, JOURNAL):
            raise UserError(f"{manifest} is written by stretto collect: name another folder with -o.")
        origin = {"manifest": str(own), SHA256: artifact.file_digest(manifest)}
        try:
            before = json.loads((self.folder / ORIGIN).read_text())
        except FileNotFoundError:
            if any(path.name != LOCK and path.resolve() != own for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} holds other things: name a new folder with -o.") from None
        else:
            if before["manifest"] != origin["manifest"] and before[SHA256] != origin[SHA256]:
                raise UserError(
                    f"{self.folder} holds what {before['manifest']} names, and {manifest} is another manifest: name "
                    "another folder with -o."
                )
        artifact.write_json(self.folder / ORIGIN, origin)

    def _read(self) -> Iterator[Stored]:
        """The lines of the journal. A kill or a power cut may tear the last one; its file is fetched again."""
        path = self.folder / JOURNAL
        whole = b""
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                os.truncate(path, len(whole))
        for line in whole.splitlines():
            try:
                yield Stored(**json.loads(line))
            except (ValueError, TypeError):
                continue

    def _is_there(self, stored: Stored) -> bool:
        path = self.folder / stored.path
        return path.is_file() and path.stat().st_size == stored.bytes

    @staticmethod
    def _append(file: TextIO, row: dict[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()
