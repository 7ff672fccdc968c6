"""`python -m launcher.guard COMMAND…`: runs a command, and ends all it started as soon as the launcher is gone.

The launcher holds the other end of this process's standard input. When that closes, by whatever death of the launcher,
the whole process group is killed: a stage may have started processes that know nothing of the launcher (the deepspeed
command starts a second one, and that the ranks). The guard ends last, so its end is the end of the group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil

GRACE_SECONDS = 60
"""For ranks that save when told to stop."""


def main() -> int:
    # Signals are for the group; handlers, unlike SIG_IGN, are not inherited by the command.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_kill_when_alone, daemon=True).start()
    code = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL).wait()
    if not _gone(seconds=1):
        # The command left processes behind: the deepspeed command, told to stop, ends before its ranks have saved.
        os.killpg(0, signal.SIGTERM)
        if not _gone(GRACE_SECONDS):
            for process in others_in_group(os.getpgrp()):
                process.kill()
    return code if code >= 0 else 128 - code


def _kill_when_alone() -> None:
    os.read(0, 1)  # nothing is ever written: it returns when the other end closes
    os.killpg(0, signal.SIGKILL)


def _gone(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while others_in_group(os.getpgrp()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def others_in_group(group: int) -> list[psutil.Process]:
    """The living processes of a process group, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            member = process.pid != os.getpid() and os.getpgid(process.pid) == group
            if member and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
