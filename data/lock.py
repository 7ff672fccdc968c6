"""One job at a time in a folder, by a lock that the kernel takes back however its holder ends. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from model.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which says who does.

    Raises UserError that names the holder where there is one, and where the folder cannot be written.
    """
    with _opened(folder) as file:
        # A process forked from this one, such as a loader of data, would hold the lock too, and outlive this one.
        os.register_at_fork(after_in_child=file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use {_holder(file.read())}.") from None
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _opened(folder: Path):
    try:
        return (folder / LOCK).open("a+")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. Get the right to write there, or use another folder."
        ) from None


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        host, pid = holder["host"], holder["pid"]
        since = time.strftime("%d %B %H:%M:%S", time.localtime(holder["since"]))
    except (json.JSONDecodeError, KeyError, TypeError):  # it is just about to write who it is
        return "by another process: wait for it"
    here = host == socket.gethostname()
    where = "" if here else f" on {host}"
    return f"by process {pid}{where} since {since}: wait for it, or stop it{'' if here else ' there'} with `kill {pid}`"
