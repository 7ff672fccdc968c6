"""Who may be asked for something now: so many requests a second and so many connections for each host."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter, defaultdict
from typing import Generic, TypeVar

from data.collect.failure import Stopped

Task = TypeVar("Task")


class Hosts(Generic[Task]):
    """A queue for each host, from which threads take a task when its host may be asked again.

    A task that has to wait holds nobody up but itself. `take` gives a Visit, which stands for one connection to the
    host and ends with `leave`.
    """

    def __init__(self, per_second: float, connections: int) -> None:
        self._interval: dict[str, float] = defaultdict(lambda: 1 / per_second)
        self._connections = connections
        self._changed = threading.Condition()
        self._queues: dict[str, list[tuple[float, int, Task]]] = defaultdict(list)
        self._due: dict[str, float] = defaultdict(float)
        self._open: Counter[str] = Counter()
        # When a host may have work for someone, at the earliest. Of several entries the one that is `_listed` counts.
        self._calendar: list[tuple[float, str]] = []
        self._listed: dict[str, float] = {}
        self._order = itertools.count()
        self._unfinished = 0
        self._stopped = False

    def put(self, task: Task, host: str, wait: float = 0.0) -> None:
        """Queues `task`, to be taken in `wait` seconds at the earliest. Each needs a `finish` of its own."""
        with self._changed:
            self._unfinished += 1
            heapq.heappush(self._queues[host], (time.monotonic() + wait, next(self._order), task))
            self._announce(host)

    def take(self) -> tuple[Task, Visit] | None:
        """The next task whose host may be asked; waits for one. None when all are finished, or at a stop."""
        with self._changed:
            while self._unfinished and not self._stopped:
                now = time.monotonic()
                if not self._calendar or self._calendar[0][0] > now:
                    self._changed.wait(self._calendar[0][0] - now if self._calendar else None)
                    continue
                ready, host = heapq.heappop(self._calendar)
                if self._listed.get(host) != ready:
                    continue
                del self._listed[host]
                if not self._queues[host] or self._open[host] >= self._connections:
                    continue  # it is announced again when this changes
                if self._ready(host) > now:
                    self._announce(host)
                    continue
                _, _, task = heapq.heappop(self._queues[host])
                self._enter(host)
                self._announce(host)
                return task, Visit(self, host)
            return None

    def finish(self) -> None:
        """Says that a task that was taken is done with."""
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Gives out no more tasks, and ends all waiting with Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def slow_down(self, host: str, seconds: float) -> None:
        """At least so many seconds from one request to the next, from now on."""
        with self._changed:
            if seconds > self._interval[host]:
                self._interval[host] = seconds
                self._due[host] = time.monotonic() + seconds

    def interval(self, host: str) -> float:
        return self._interval[host]

    def pause(self, host: str, seconds: float) -> None:
        """No request for so many seconds."""
        with self._changed:
            self._due[host] = max(self._due[host], time.monotonic() + seconds)

    def enter(self, host: str) -> None:
        """Waits until one more connection to `host` and one more request are allowed, and takes them."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                free = self._open[host] < self._connections
                if free and self._due[host] <= now:
                    self._enter(host)
                    return
                self._changed.wait(self._due[host] - now if free else None)
            raise Stopped

    def leave(self, host: str) -> None:
        with self._changed:
            self._open[host] -= 1
            self._announce(host)

    def _enter(self, host: str) -> None:
        self._open[host] += 1
        self._due[host] = time.monotonic() + self._interval[host]

    def _ready(self, host: str) -> float:
        return max(self._due[host], self._queues[host][0][0])

    def _announce(self, host: str) -> None:
        if self._queues[host] and self._ready(host) < self._listed.get(host, math.inf):
            self._listed[host] = self._ready(host)
            heapq.heappush(self._calendar, (self._listed[host], host))
        self._changed.notify_all()


class Visit:
    """One connection of one thread, which may lead from host to host, and the requests it may make there."""

    def __init__(self, hosts: Hosts, host: str) -> None:
        self._hosts = hosts
        self._host: str | None = None
        self._interval: float | None = None
        self._stand_for(host)

    def reserve(self, host: str) -> None:
        """Waits until one request to `host` is allowed, unless one already is. Raises Stopped."""
        # What was allowed before the host asked for longer intervals is so no more.
        if self._host == host and self._interval == self._hosts.interval(host):
            return
        self.leave()
        self._hosts.enter(host)
        self._stand_for(host)

    def spend(self) -> None:
        """The request that was reserved is made."""
        self._interval = None

    def leave(self) -> None:
        if self._host is not None:
            self._hosts.leave(self._host)
        self._host = None

    def _stand_for(self, host: str) -> None:
        self._host, self._interval = host, self._hosts.interval(host)
