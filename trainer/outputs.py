"""Files of an artifact that are made one after another: what an interruption has left finished is not made again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import artifact

JOURNAL = "finished.jsonl"
"""In the folder WORK of an artifact that is not finished: the files that are, a line each."""
SPARE_BYTES, SPARE_BYTES_A_FILE = 1 << 20, 1 << 14
"""For what the disk needs beside the contents."""
BLOCK = 512
"""Bytes that `st_blocks` counts in."""


@dataclass(frozen=True)
class Output:
    """A file that is to be made."""

    name: str
    """Relative to the folder."""
    nbytes: int
    """That it holds, but for its header."""
    write: Callable[[Path], dict[str, Any]]
    """Writes it, reads it back, and returns its size and SHA-256."""


def text_output(name: str, text: str) -> Output:
    def write(path: Path) -> dict[str, Any]:
        path.write_text(text)
        artifact.sync(path)
        return artifact.describe_files(path.parent, [path.name])[path.name]

    return Output(name, len(text), write)


def left_to_make(path: Path, fingerprint: str, outputs: Sequence[Output]) -> list[Output]:
    """Those of `outputs` that are not finished for the artifact `path`: what was noted of a file must still be true."""
    if not artifact.began(path, fingerprint):
        return list(outputs)
    folder = artifact.unfinished(path)
    noted = journal(folder)
    there = artifact.describe_files(folder, noted)
    return [output for output in outputs if output.name not in noted or there.get(output.name) != noted[output.name]]


def journal(folder: Path) -> dict[str, dict[str, Any]]:
    """What is noted of the files that are finished. Lines that a kill or a crash left damaged do not count."""
    found = {}
    try:
        lines = (folder / artifact.WORK / JOURNAL).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            row = json.loads(line)
            found[row["name"]] = row["file"]
    return found


def make(folder: Path, output: Output) -> dict[str, Any]:
    """Writes one file and notes that it is finished."""
    path = folder / output.name
    path.parent.mkdir(parents=True, exist_ok=True)
    described = output.write(path)
    with (folder / artifact.WORK / JOURNAL).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        torn = file.read() not in (b"", b"\n")  # by a kill; what is appended begins a line of its own
        line = json.dumps({"name": output.name, "file": described}) + "\n"
        file.write(b"\n" * torn + line.encode())
        file.flush()
        os.fsync(file.fileno())
    return described


def require_room(path: Path, outputs: Sequence[Output]) -> None:
    """Raises UserError where the disk of `path` has not the room for all of `outputs`, the artifact's files that are
    left to make. What an interruption left of them half there gives its room to them."""
    needed = sum(output.nbytes + SPARE_BYTES_A_FILE for output in outputs) + SPARE_BYTES
    half = [artifact.unfinished(path) / output.name for output in outputs]
    artifact.require_room(path, needed - sum(file.stat().st_blocks * BLOCK for file in half if file.is_file()))
