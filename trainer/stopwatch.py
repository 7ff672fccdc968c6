"""How long something takes on the device, added up over many steps without once waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time spent in `with watch.running():`.

    On a GPU that is the time from when the device has done all that came before to when it has done what was asked of
    it inside. What the host does meanwhile counts only where the device has to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds = 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self.cuda:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((begin, end))
        while self._marks[0][1].query() and len(self._marks) > 1:  # those the device has passed; asks, does not wait
            self._take()

    def seconds(self) -> float:
        """Seconds so far. Waits for the device."""
        if self._marks:
            self._marks[-1][1].synchronize()
        while self._marks:
            self._take()
        return self._seconds

    def _take(self) -> None:
        begin, end = self._marks.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
