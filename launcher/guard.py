"""`python -m launcher.guard`: runs one command on one host, and ends all it started as soon as nobody asks for it.

The first line of its standard input is the task, as JSON (`launcher.processes.Task`); then come single bytes: SAVE, END
and PING. When the input closes, by whatever death of its supervisor, or no byte comes for the task's `lease` seconds,
because the network is cut, the whole process group is killed: a stage may have started processes that know nothing of
the supervisor (the deepspeed command starts a second one, and that the ranks). The guard ends last, so its end is the
end of the group, and nothing lives longer than the lease on a host that was given up; should the guard itself be
killed, a process that waits for that ends the group.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

SAVE, END, PING = b"s", b"e", b"."
ANOTHER_JOBS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a process believe it is part of a job it is not in."""
GRACE_SECONDS = 60
"""For ranks that save when told to stop."""


def main() -> int:
    # Signals are for the group; handlers, unlike SIG_IGN, are not inherited by the command.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    _end_with_this_process()
    line = _read_line()
    if not line:
        return 1
    task = json.loads(line)
    command = subprocess.Popen(task["command"], stdin=subprocess.DEVNULL, cwd=task["folder"], env=environment(task))
    threading.Thread(target=_heed, args=(task["lease"],), daemon=True).start()
    code = command.wait()
    if not _gone(seconds=1):
        # The command left processes behind: the deepspeed command, told to stop, ends before its ranks have saved.
        os.killpg(0, signal.SIGTERM)
        if not _gone(GRACE_SECONDS):
            for process in others_in_group(os.getpgrp()):
                process.kill()
    return code if code >= 0 else 128 - code


def _end_with_this_process() -> None:
    """Leaves a process behind, in a session of its own, that kills the group of this one when this one is gone."""
    ended, held = os.pipe()  # no process that is started from here inherits them
    group = os.getpgrp()
    if os.fork():
        os.close(ended)
        return
    os.setsid()
    os.close(held)
    try:
        os.read(ended, 1)  # nobody writes: it returns when the other end is closed, however its holder died
        os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)  # most often the group is empty by then, which is said as an error


def environment(task: dict[str, Any]) -> dict[str, str]:
    """This host's own variables under those of the task, and what follows from the host."""
    env = {name: value for name, value in os.environ.items() if name not in ANOTHER_JOBS} | task["environment"]
    # deepspeed looks for ninja, which lies beside this Python.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // task["sharers"])))
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def _read_line() -> bytes:
    """Byte by byte: what follows the line is for `_heed`."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _heed(lease: float | None) -> None:
    while True:
        ready, _, _ = select.select([0], [], [], lease)
        told = os.read(0, 4096) if ready else b""
        if not told or END in told:
            os.killpg(0, signal.SIGKILL)
        if SAVE in told:
            os.killpg(0, signal.SIGTERM)


def _gone(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(others_in_group(os.getpgrp())):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def others_in_group(group: int) -> Iterator[psutil.Process]:
    """The living processes of a process group, but for this one."""
    for process in psutil.process_iter():
        try:
            member = process.pid != os.getpid() and os.getpgid(process.pid) == group
            if member and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue


if __name__ == "__main__":
    sys.exit(main())
