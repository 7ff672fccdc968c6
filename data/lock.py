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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from model.errors import UserError

LOCK = ".lock"
PAUSE_SECONDS = 0.2
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What the kernel says where a file system has no locks, such as Lustre when it is mounted without `flock`."""
PATIENCE = "STRETTO_PATIENCE"
"""The environment variable that says how many seconds a training waits for the lock of its stage, set where it is
started again: a file server gives a lost host's lock back only some time after its end."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `since` is in seconds since 1970."""

    host: str
    pid: int
    since: float

    def alive(self) -> bool:
        """Whether it still lives; a later process with its number is not it. Of another host that cannot be seen."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            return process.create_time() <= self.since and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def holder(folder: Path) -> Holder | None:
    """Who works in `folder`, by what its lock file says; None where nobody does, or who did is dead.

    The lock itself is not asked for: holding it for a moment could turn somebody away.
    """
    try:
        found = _read_holder((folder / LOCK).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if found and found.alive() else None


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock of `folder`, which says who does.

    Raises UserError that names the holder where there still is one after `patience` seconds, and where the folder
    cannot be written or its disk has no locks.
    """
    with _opened(folder) as file:
        # A process forked from this one, such as a loader of data, would hold the lock too, and outlive this one.
        os.register_at_fork(after_in_child=file.close)
        deadline = time.monotonic() + patience
        if not can_lock(file):
            raise UserError(
                f"the disk of {folder} has no file locks: have it mounted with flock, or choose another folder with -o."
            )
        while not _taken(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise UserError(f"{folder} is in use {_in_words(_read_holder(file.read()))}.")
            time.sleep(PAUSE_SECONDS)
        file.truncate(0)
        file.write(json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), time.time()))))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def can_lock(file: IO[Any]) -> bool:
    """Whether the disk of an open file has locks at all. One that nobody else holds is then held."""
    try:
        _taken(file)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _taken(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(folder: Path):
    try:
        return (folder / LOCK).open("a+")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. Get the right to write there, or use another folder."
        ) from None


def _read_holder(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (json.JSONDecodeError, TypeError):  # a lock that nobody holds is empty
        return None


def _in_words(holder: Holder | None) -> str:
    if holder is None:  # it is just about to write who it is
        return "by another process: wait for it"
    since = time.strftime("%d %B %H:%M:%S", time.localtime(holder.since))
    here = holder.host == socket.gethostname()
    where = "" if here else f" on {holder.host}"
    stop = f"stop it{'' if here else ' there'} with `kill {holder.pid}`"
    return f"by process {holder.pid}{where} since {since}: wait for it, or {stop}"
