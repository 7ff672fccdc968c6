"""The supervisor of a stage's job: the handle that names it, and what it says: RUN/jobs/STAGE.json, which the launcher
begins before the job does, and which then only its supervisor writes."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

from data.lock import Holder
from model import artifact

JOBS = "jobs"
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Where the kernel says which boot this is."""


def read_job(run: Path, stage: str) -> dict[str, Any] | None:
    """What the supervisor of a stage's job has said of it last; None where there is nothing."""
    try:
        return json.loads((run / JOBS / f"{stage}.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def record_job(run: Path, stage: str, job: str, **entry: Any) -> None:
    """Changes what is said of the job of a stage.

    `job` is the handle by which the launcher knows it; what was said of another job is forgotten.
    """
    said = read_job(run, stage) or {}
    (run / JOBS).mkdir(exist_ok=True)
    artifact.write_json(run / JOBS / f"{stage}.json", {**(said if said.get("job") == job else {}), "job": job, **entry})


def handle_of(stage: str, pid: int) -> str:
    """What names a supervisor; a later process with its number has another name."""
    return f"{stage}:{socket.gethostname()}:{pid}:{_started(pid)}"


def _started(pid: int) -> str:
    """When a process was started: by the ticks of this boot, since the clock of a machine may be set while it runs."""
    boot = BOOT.read_text().partition("-")[0]
    # After the name in brackets, which may hold anything, comes the third field; this is the 22nd.
    return f"{boot}-{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


def supervisor(handle: str) -> Holder:
    """The process that a handle names."""
    _, host, pid, _ = handle.split(":")
    return Holder(host, int(pid), math.inf)


def alive(handle: str) -> bool:
    """Whether the supervisor that a handle names lives on this machine; a later process with its number is not it."""
    _, host, pid, started = handle.split(":")
    try:
        return host == socket.gethostname() and started == _started(int(pid)) and supervisor(handle).alive()
    except (FileNotFoundError, ProcessLookupError):
        return False


def elsewhere(run: Path, stage: str, handle: str) -> bool:
    """Whether a supervisor was started on another machine, and has not said that it has ended."""
    said = read_job(run, stage) or {}
    return said.get("job") == handle and "code" not in said and supervisor(handle).host != socket.gethostname()
