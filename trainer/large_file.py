"""Large files that are written and read past the system's cache, where the disk can do that: it takes less of a
processor, and what the training reads stays in the cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

DIRECT = getattr(os, "O_DIRECT", 0)
"""macOS has none."""


class LargeFile:
    """One file, for use in `with`. Blocks should be large and lie at the start of a page of memory."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        try:
            self._handle = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _say_cached()
            self._handle = os.open(path, flags, 0o666)

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def write(self, block: memoryview) -> None:
        """Writes all of it where the last write ended."""
        while len(block):
            block = block[self._move(os.write, block) :]

    def read_into(self, block: memoryview) -> int:
        """Reads on from where the last read ended; returns how much of `block` was filled, less than all at the end."""
        filled = 0
        while filled < len(block) and (count := self._move(os.readv, [block[filled:]])):
            filled += count
        return filled

    def sync(self) -> None:
        """Brings all of it to the disk, from where the next reader gets it."""
        os.fsync(self._handle)
        with contextlib.suppress(AttributeError):  # macOS has none
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def _move(self, function: Callable[[int, Any], int], block: Any) -> int:
        """What a disk does not take directly, such as the last block, which is not whole, goes through the cache."""
        try:
            return function(self._handle, block)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fcntl.fcntl(self._handle, fcntl.F_SETFL, fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~DIRECT)
            return function(self._handle, block)


@cache
def _say_cached() -> None:
    """Once a process: every checkpoint has a folder of its own."""
    log.info("the run folder is on a disk without direct writes: large files go through the system's cache")
