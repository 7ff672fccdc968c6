"""Tables of rows, JSON lines or CSV, as people write them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

Row = dict[str, Any] | str
"""A row by its columns, or what is wrong with it in words."""


def rows(path: str) -> Iterator[tuple[int, Row]]:
    """Each row of a table, JSON lines unless its name says CSV or TSV, with its line number. Raises OSError."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from _table_rows(file) if path.lower().endswith((".csv", ".tsv")) else _json_rows(file)


def _json_rows(file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else "not a JSON object"


def _table_rows(file: TextIO) -> Iterator[tuple[int, Row]]:
    header = file.readline()
    file.seek(0)
    separator = max(",;\t", key=header.count)  # some spreadsheets write semicolons
    reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"not a CSV row ({error})"
            continue
        if row is None:
            return
        yield reader.line_num, row if None not in row else "it has more fields than the header"


def numbered(rows: list[dict[str, Any]]) -> None:
    """Makes numbers of the columns of a text table whose every value is one, in all `rows`."""
    for name in {name for row in rows for name in row}:
        texts = [row[name] for row in rows if name in row]
        for kind in (int, float):
            try:
                values = {text: kind(text) for text in texts}
            except ValueError:
                continue
            if all(map(math.isfinite, values.values())):
                for row in rows:
                    if name in row:
                        row[name] = values[row[name]]
            break
