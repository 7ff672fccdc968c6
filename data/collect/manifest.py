"""The manifest of what to fetch: JSON lines, CSV or TSV with a column `url`; every further column is kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from data.caption_files import CAPTION_COLUMNS, FILE_COLUMNS
from data.collect.failure import Failure
from data.sources.rows import numbered
from data.tables import rows
from model.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv")
URL = "url"
SHA256 = "sha256"
MALFORMED = "malformed row"
SCHEMES = ("http", "https")
TEXTS = frozenset({SHA256, *CAPTION_COLUMNS, "tags", "split", "id"})
"""Columns that stay text though a table may have only numbers in them."""


@dataclass(frozen=True)
class Row:
    """One row: its line in the manifest, and its columns without the address."""

    line: int
    columns: dict[str, Any]


@dataclass
class Source:
    """One address and the rows that name it: a file may be cut into several clips."""

    url: str
    """As it is shown and recorded: without a user's name and password."""
    address: str
    """As it is asked for."""
    rows: list[Row] = field(default_factory=list)
    sha256: str | None = None
    """What the manifest says the file has."""

    @property
    def key(self) -> str:
        """The name of its partial file."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:32]

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.lower()


@dataclass(frozen=True)
class Fault:
    """A row that names nothing that could be fetched."""

    line: int
    url: str
    failure: Failure


@dataclass
class Manifest:
    path: Path
    sources: list[Source]
    """In the order of the lines that name them first."""
    faults: list[Fault]


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest; rows that cannot be used are listed, and the others stand.

    Raises UserError when there is no such file, its name or its encoding is another, it has no column `url`, or it
    holds no rows.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a manifest is a file that ends in {', '.join(SUFFIXES)}.")
    sources: dict[str, Source] = {}
    faults: list[Fault] = []
    empty, named = True, False
    for line, row in _cells(path):
        empty = False
        try:
            columns = _columns(row)
            named = named or URL in columns
            _add(sources, line, columns)
        except Failure as failure:
            faults.append(Fault(line, _shown(row), failure))
    if empty:
        raise UserError(f"{path} holds no rows: each names an address in its column `url`.")
    if not named:
        malformed = next((fault for fault in faults if fault.failure.reason == MALFORMED), None)
        found = f" Line {malformed.line} is {malformed.failure.detail}." if malformed else ""
        raise UserError(f"{path} has no column `url`, which names what to fetch.{found}")
    if path.suffix.lower() != SUFFIXES[0]:
        _make_numbers([row for source in sources.values() for row in source.rows])
    return Manifest(path, list(sources.values()), faults)


def without_credentials(url: str) -> str:
    """`url` as it may be shown: `http://user:password@host/` → `http://host/`."""
    return re.sub(r"(?<=//)[^/?#]*@", "", url)


def http_address(text: str) -> str:
    """An http(s) address without its fragment. Raises Failure for what is none."""
    try:
        parts = urlsplit(text)
        _ = parts.port, text.encode()  # each may raise
    except ValueError:
        raise Failure("malformed address", "it does not read as an address") from None
    if parts.scheme not in SCHEMES:
        begins = f"{parts.scheme}:" if parts.scheme else "neither"
        raise Failure("not http", f"addresses begin with http:// or https://, this one with {begins}")
    if not parts.hostname:
        raise Failure("malformed address", "it names no host")
    return urldefrag(text).url


def _shown(row: dict[str, Any] | str) -> str:
    return without_credentials(str(row.get(URL, ""))) if isinstance(row, dict) else ""


def _add(sources: dict[str, Source], line: int, columns: dict[str, Any]) -> None:
    text = columns.pop(URL, None)
    if not isinstance(text, str) or not text.strip():
        raise Failure("no address", "the row has no url")
    address = http_address(text.strip())
    digest = columns.get(SHA256)
    if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
        raise Failure("malformed sha256", "a sha256 has 64 hexadecimal digits")
    url = without_credentials(address)
    source = sources.setdefault(url, Source(url, address))
    digest = digest and digest.lower()
    if digest and source.sha256 and digest != source.sha256:
        raise Failure("contradicting sha256", f"line {source.rows[0].line} gives another one for the same address")
    source.sha256 = source.sha256 or digest
    source.rows.append(Row(line, columns))


def _columns(row: dict[str, Any] | str) -> dict[str, Any]:
    """The columns that have something in them. The address's is `url`, however it is spelt; what would be taken for the
    path of a file is told apart from the one that the file will have."""
    if isinstance(row, str):
        raise Failure(MALFORMED, row)
    columns = {}
    for name, value in row.items():
        kind = name.strip().lower()
        if kind == URL:
            columns[URL] = value
        elif value not in (None, ""):
            columns[f"original_{name}" if kind in FILE_COLUMNS else name] = value
    return columns


def _cells(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            while file.read(1 << 20):
                pass
        yield from rows(str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a manifest of addresses.") from None


def _make_numbers(rows: list[Row]) -> None:
    """A table knows only text: columns that have a number in every row become numbers."""
    columns = [{name: value for name, value in row.columns.items() if name.lower() not in TEXTS} for row in rows]
    numbered(columns)
    for row, numbers in zip(rows, columns, strict=True):
        row.columns.update(numbers)
