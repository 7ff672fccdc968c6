"""Runs of tests/launcher/fake_run.py, told how to behave and watched, shared by the tests of the launcher."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

FAKE = Path(__file__).parent / "launcher" / "fake_run.py"
PATIENCE = 60
"""Seconds until something that must happen has failed to."""


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FAKE), str(run), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, output


def build(run: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of one run of the fake stages."""
    return finish(start(run, *arguments))


def tell(run: Path, stage: str, behaviour: str) -> Path:
    told = run.with_name(f"{run.name}-{stage}")
    told.write_text(behaviour)
    return told


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def of_run(run: Path) -> list[int]:
    """The processes that work for `run`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(run) in (process.info["cmdline"] or []) and alive(process.pid):
            found.append(process.pid)
    return found
