"""The supervisor of a stage's job: the handle that names it, and what it says: RUN/jobs/STAGE.json, whose one writer it
is."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import psutil

from data.lock import Holder
from model import artifact

JOBS = "jobs"


def read_job(run: Path, stage: str) -> dict[str, Any] | None:
    """What the supervisor of a stage's job has said of it last; None where there is nothing."""
    try:
        return json.loads((run / JOBS / f"{stage}.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def record_job(run: Path, stage: str, job: str, **entry: Any) -> None:
    """For the supervisor of a stage's job, which alone writes this: changes what is said of the stage.

    `job` is the handle by which the launcher knows it; what was said of another job is forgotten.
    """
    said = read_job(run, stage) or {}
    (run / JOBS).mkdir(exist_ok=True)
    artifact.write_json(run / JOBS / f"{stage}.json", {**(said if said.get("job") == job else {}), "job": job, **entry})


def handle_of(stage: str, process: psutil.Process) -> str:
    """What names a supervisor: a later process with its number has another time."""
    return f"{stage}:{socket.gethostname()}:{process.pid}:{process.create_time():.2f}"


def supervisor(handle: str) -> Holder:
    """The process that a handle names."""
    _, host, pid, started = handle.split(":")
    return Holder(host, int(pid), float(started) + 0.01)  # the time in a handle is rounded


def alive(handle: str) -> bool:
    """Whether the supervisor that a handle names lives on this machine; a later process with its number is not it."""
    found = supervisor(handle)
    return found.host == socket.gethostname() and found.alive()


def elsewhere(run: Path, stage: str, handle: str) -> bool:
    """Whether a supervisor was started on another machine, and has not said that it has ended."""
    said = read_job(run, stage) or {}
    return said.get("job") == handle and "code" not in said and supervisor(handle).host != socket.gethostname()
