"""Reading `metrics.jsonl`, which may be being written: a torn last line is not an error. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TAIL_BYTES = 64 * 1024
"""How much of the end of a file is read for its last rows; a row has some 300 bytes."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole row, in the order written; none where there is no file yet.

    Raises ValueError when a line other than the last does not read: then the file is damaged.
    """
    if not path.exists():
        return []
    return _rows(path.read_bytes())


def last_metrics(path: Path, kind: str) -> dict[str, Any] | None:
    """The newest row of a kind ("train", "validation"), found in the end of the file; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
    if size > TAIL_BYTES:
        tail = tail[tail.index(b"\n") + 1 :]  # the first line is most likely cut
    return next((row for row in reversed(_rows(tail)) if row["kind"] == kind), None)


def _rows(data: bytes) -> list[dict[str, Any]]:
    # What follows the last line end is a row being written, or torn when its writer died.
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
