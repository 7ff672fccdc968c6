"""What every process that a run starts does at its start and says at its end. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from model.errors import UserError

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent ends, however that ends. Does nothing where not on Linux.

    A parent whose process id is known may have ended before this is called.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def plain_errors(folder: Path | None = None) -> Iterator[None]:
    """Turns what the user can put right into one plain "error: …" on stderr and exit code 2; all else is raised.

    `folder` is where the work is written: its disk is named when it is full.
    """
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(disk_full(folder or error.filename))


def fail(message: str, code: int = 2) -> None:
    """Says what is wrong and ends the process; further lines are indented, so that a log shows where they end."""
    print("error: " + message.replace("\n", "\n       "), file=sys.stderr, flush=True)
    raise SystemExit(code)


def disk_full(place: Path | str | None) -> str:
    """What to say when the disk of `place`, or its user's share of it, is full."""
    where = f"the disk of {place}" if place else "a disk"
    return f"{where} is full: make room, then run the same command again. What is finished is kept."
