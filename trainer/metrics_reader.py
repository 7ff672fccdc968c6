"""Reading `metrics.jsonl`, which may be being written: a torn last line is not an error. Imports no torch."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""Name of the file in a stage's folder."""


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
    """The newest row of a kind ("train", "validation"), looked for from the end of the file, which may be large; None
    where there is none."""
    if not path.exists() or not path.stat().st_size:
        return None
    word = f'"{kind}"'.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # What follows the last line end is a row being written, or torn when its writer died.
        end = data.rfind(b"\n") + 1
        while (at := data.rfind(word, 0, end)) >= 0:
            start = data.rfind(b"\n", 0, at) + 1
            row = json.loads(data[start : data.find(b"\n", at)])
            if row["kind"] == kind:
                return row
            end = start
    return None


def _rows(data: bytes) -> list[dict[str, Any]]:
    # What follows the last line end is a row being written, or torn when its writer died.
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
