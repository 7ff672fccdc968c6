"""The names of what a job's processes share through mosaicml-streaming: shared memory and lock files.

streaming counts names up from 000000 for the whole machine, so jobs that start, or end, at the same moment trip over
each other, and what a killed job leaves stays. Here the names begin with the job's own.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch.distributed as dist
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import prefix as streaming_prefix

SHARED_MEMORY = Path("/dev/shm")
JOB_NAME = "stretto-"
LOCK = ".lock"


def world_size() -> int:
    """Ranks of this job, by the environment that streaming reads.

    Raises RuntimeError where its launcher left that incomplete: every rank would take itself for the first of its node.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and ("LOCAL_WORLD_SIZE" not in os.environ or not dist.is_initialized()):
        raise RuntimeError("Set LOCAL_WORLD_SIZE and initialise the process group before shards are opened.")
    return ranks


_job: str | None = None


def claim_names() -> None:
    """Gives the shared memory and lock files of this job names that no other job has.

    Every process of a job holds a lock that the system lets go when it dies, however it dies: leftovers are the names
    whose lock is free. All ranks must call it, and before any dataset is opened.
    """
    global _job
    ranks = world_size()
    if _job is not None:
        return
    names = [f"{JOB_NAME}{os.getpid()}-{secrets.token_hex(4)}"]
    if ranks > 1:
        dist.broadcast_object_list(names)
    _job = job = names[0]

    def path(prefix_int: int, name: str) -> str:
        return f"{job}-{prefix_int:06}_{name}"

    streaming_prefix._get_path = streaming_dataset._get_path = path
    if SHARED_MEMORY.is_dir():
        remove_leftovers()
        lock = _held(SHARED_MEMORY / f"{job}{LOCK}")

        def leave() -> None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # not left to the end of the process: a loader worker may hold it open
            lock.close()
            remove_leftovers()  # of this job too, if this was its last process

        atexit.register(leave)


def _held(path: Path) -> IO[str]:
    """The file `path`, locked. Before it was, another job may have taken it for a leftover and removed it."""
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()


def remove_leftovers() -> None:
    """Removes the shared memory and lock files of jobs of ours that are dead. Another user's are not ours to remove."""
    for lock in SHARED_MEMORY.glob(f"{JOB_NAME}*{LOCK}"):
        with contextlib.suppress(FileNotFoundError, PermissionError), _free(lock) as free:
            if free:
                for folder in (Path(tempfile.gettempdir()), SHARED_MEMORY):
                    for path in folder.glob(f"{lock.name.removesuffix(LOCK)}-*"):
                        path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _free(lock: Path) -> Iterator[bool]:
    """Whether nobody holds `lock`; if so it is held meanwhile."""
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
