"""`stretto logs`: what the processes of a stage print. Imports no torch."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from launcher.graph import stage_named
from launcher.status import ORDER, read_status
from model.errors import UserError

BLOCK = 1 << 16
"""Bytes read at a time: logs grow large."""
POLL_SECONDS = 0.3


def log_of(run: Path, stage: str | None = None, rank: int | None = None) -> tuple[str, Path]:
    """The stage, which is the one that wrote last where none is named, and its log; with `rank` that of one rank of a
    training.

    Raises UserError where `run` is not a run folder, or there is no such stage or log.
    """
    read_status(run)
    if stage is None:
        found = [path for name in ORDER if (path := run / "logs" / f"{name}.log").is_file()]
        if not found:
            raise UserError(f"{run} has no logs yet: nothing has been started.")
        stage = max(found, key=lambda path: path.stat().st_mtime).stem
    name = stage_named(stage).name
    path = run / "logs" / f"{name}.log" if rank is None else run / name / "logs" / f"rank-{rank:04d}.log"
    if not path.is_file():
        raise UserError(f"there is no {path}: {name} has not been started{'' if rank is None else ' on that rank'}.")
    return name, path


def goes_on(run: Path, stage: str) -> bool:
    """Whether more may be written to the log of a stage."""
    status = read_status(run)
    states = {one.name: one.state for one in status.stages}
    return status.state == "running" and states[stage] in ("running", "waiting")


def read_log(path: Path, lines: int, going: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """The last `lines` lines of a log, all of it with 0, and then what is appended while `going` says so."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with path.open("rb") as file:
        file.seek(_start_of(file, lines) if lines else 0)
        while True:
            more = going()  # before the read, so that the last words are not missed
            while block := file.read(BLOCK):
                yield decoder.decode(block)
            if not more:
                return
            time.sleep(POLL_SECONDS)


def _start_of(file: BinaryIO, lines: int) -> int:
    """Where the last `lines` lines begin, looked for from the end."""
    end = position = file.seek(0, os.SEEK_END)
    while position:
        size = min(BLOCK, position)
        position = file.seek(position - size)
        block = file.read(size)
        at = min(size, end - 1 - position)  # the end of the last line is not the end of one before it
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            lines -= 1
            if not lines:
                return position + at + 1
    return 0
