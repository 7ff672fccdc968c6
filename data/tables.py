"""Tables of rows, JSON lines or CSV, as people write them: any separator, byte order marks, mixed line ends."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.storage import opened

UTF16 = (b"\xff\xfe", b"\xfe\xff")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""How a byte that is no UTF-8 is read."""
TABLES = (".csv", ".tsv")

Row = dict[str, Any] | str
"""A row by its columns, or what is wrong with it in words."""


def rows(path: str) -> Iterator[tuple[int, Row]]:
    """Each row of a table, JSON lines unless its name says CSV or TSV, with its line number. Raises OSError."""
    with opened(path) as raw:
        head = raw.read(2)
        raw.seek(0)
        # Bytes that are no UTF-8 are kept: they may be the name of a file.
        encoding = "utf-16" if head in UTF16 else "utf-8-sig"
        with io.TextIOWrapper(io.BufferedReader(raw), encoding, errors="surrogateescape", newline="") as file:
            yield from _table_rows(file) if path.lower().endswith(TABLES) else _json_rows(file)


def header(path: str) -> Sequence[str]:
    """The column names of a CSV or TSV. Raises OSError."""
    with opened(path) as raw, io.TextIOWrapper(io.BufferedReader(raw), "utf-8-sig", errors="surrogateescape") as file:
        try:
            return _reader(file).fieldnames or ()
        except csv.Error:
            return ()


def column(row: Mapping[Any, Any] | Sequence[str], wanted: Sequence[str]) -> str | None:
    """The key of `row` that is one of `wanted`, in any case, the first wanted first."""
    lowered = {name.strip().lower(): name for name in row if isinstance(name, str)}
    return next((lowered[name] for name in wanted if name in lowered), None)


def _json_rows(file: io.TextIOBase) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else 'not an object such as {"file": "a.wav", "caption": "..."}'


def _table_rows(file: io.TextIOBase) -> Iterator[tuple[int, Row]]:
    reader = _reader(file)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.reader.line_num, f"not a CSV row ({error})"
            continue
        if row is None:
            return
        yield reader.line_num, row if None not in row else "it has more fields than the header"


def _reader(file: io.TextIOBase) -> csv.DictReader:
    """A reader that takes the separator from the header: some spreadsheets write semicolons or tabs."""
    names = file.readline()
    file.seek(0)
    return csv.DictReader(file, delimiter=max(",;\t", key=names.count), skipinitialspace=True, strict=True)
