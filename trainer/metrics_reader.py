"""Reading `metrics.jsonl`, which may be being written: a torn last line is not an error. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""Name of the file in a stage's folder."""
TAIL_BYTES = 64 * 1024
"""How much of the end of a file is read for its last rows, to begin with; a row has some 700 bytes."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole row, in the order written; none where there is no file yet.

    Raises ValueError when a line other than the last does not read: then the file is damaged.
    """
    if not path.exists():
        return []
    return _rows(path.read_bytes())


def curve(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows of a kind that have a loss; it is null where it was not finite."""
    return [row for row in rows if row["kind"] == kind and row["loss"] is not None]


def last_metrics(path: Path, kind: str) -> dict[str, Any] | None:
    """The newest row of a kind ("train", "validation"), found in the end of the file; None where there is none."""
    if not path.exists():
        return None
    size = path.stat().st_size
    length = TAIL_BYTES
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - length))
            tail = file.read()
        if size > length:
            tail = tail[tail.find(b"\n") + 1 :]  # the first line is most likely cut
        found = next((row for row in reversed(_rows(tail)) if row["kind"] == kind), None)
        if found is not None or length >= size:
            return found
        length *= 8


def _rows(data: bytes) -> list[dict[str, Any]]:
    # What follows the last line end is a row being written, or torn when its writer died.
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
