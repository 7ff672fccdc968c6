"""What keeps a job from hanging: every rank gives signs of life, and a thread beside it ends it when there are none.

When one rank stops, all the others soon wait for it in a collective, so every rank's own watchdog sees the same
silence, writes where its rank stands and ends it. None depends on another rank, on the network, or on the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.exit_codes import HUNG

MOST_SECONDS_BETWEEN_WRITES = 10.0
MOST_SECONDS_TO_SETTLE = 5.0


class Beat(NamedTuple):
    """One sign of life."""

    time: float
    """Of the monotonic clock."""
    step: int
    """Finished steps."""
    what: str
    """What was begun then."""


class Heartbeat:
    """The last sign of life of this process. A beat costs less than a microsecond and touches no file."""

    def __init__(self) -> None:
        self.stepped = False
        """Whether this process has done a step: before that, blocks may be compiled."""
        self.last = Beat(time.monotonic(), 0, "start")

    def beat(self, step: int, what: str) -> None:
        """`step` steps are done, and `what` begins."""
        self.last = Beat(time.monotonic(), step, what)


@dataclass(frozen=True)
class Sighting:
    """What a rank's heartbeat file says. Times are seconds since 1970."""

    rank: int
    host: str
    pid: int
    step: int
    what: str
    time: float
    """Of its last sign of life."""
    written: float
    """When it wrote this, which a thread of its own does as long as the process runs at all."""


class Watchdog:
    """Watches `heartbeat` within `with`. Without a beat of any rank for `hang_timeout` seconds (`startup_timeout`
    before this process has done a step) it writes the stacks of all threads to `log` and ends the process with HUNG.

    Beats of other ranks count: the others rightly wait while one works alone. They are read, only when this rank is
    silent, from the files `folder`/rank-0000.json, which each rank's watchdog writes a few times a minute. The run
    folder is shared by all hosts; where it is not, only the ranks of this host are seen.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        folder: Path,
        log: Path,
        rank: int,
        world_size: int,
        hang_timeout: float,
        startup_timeout: float,
    ) -> None:
        self.heartbeat = heartbeat
        self.folder = folder
        self.log = log
        self.rank = rank
        self.world_size = world_size
        self.hang_timeout = hang_timeout
        self.startup_timeout = startup_timeout
        self.interval = min(MOST_SECONDS_BETWEEN_WRITES, hang_timeout / 10)
        """Seconds between two writes of the heartbeat."""
        self.settle = min(MOST_SECONDS_TO_SETTLE, hang_timeout / 4)
        """Seconds that the other ranks get to write their stacks before the end of this one ends them."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(exist_ok=True)
        self._file = self.log.open("a")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    @property
    def limit(self) -> float:
        """Seconds of silence that are too many."""
        return self.hang_timeout if self.heartbeat.stepped else self.startup_timeout

    def _watch(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            # Where C code holds the interpreter's lock this thread stands still as well; faulthandler's does not.
            faulthandler.dump_traceback_later(self.limit + self.interval + 2 * self.settle, exit=True, file=self._file)
            self._write()
            left = self.limit - (time.monotonic() - self.heartbeat.last.time)
            if left <= 0:
                seen = self._sightings()
                if time.time() - max(sighting.time for sighting in seen) >= self.limit:
                    self._end(seen)
            pause = min(left, self.interval) if left > 0 else self.interval

    def _own(self) -> Sighting:
        beat, now = self.heartbeat.last, time.time()
        when = now - (time.monotonic() - beat.time)
        return Sighting(self.rank, socket.gethostname(), os.getpid(), beat.step, beat.what, when, now)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04d}.json"

    def _write(self) -> None:
        path = self._path(self.rank)
        partial = path.with_name(f".{path.name}")
        # A full disk must not end the watch; it is said by whoever cannot do without it.
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(self._own().__dict__) + "\n")
            partial.replace(path)

    def _sightings(self) -> list[Sighting]:
        """The newest of every rank that has left one."""
        others = (read_heartbeat(self._path(rank)) for rank in range(self.world_size) if rank != self.rank)
        return [self._own(), *(sighting for sighting in others if sighting)]

    def _end(self, seen: list[Sighting]) -> None:
        # Should anything below stand still too, such as a write to a disk that is gone.
        faulthandler.dump_traceback_later(2 * self.settle, exit=True, file=sys.stderr)
        verdict = who_hung(seen, 3 * self.interval)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{stamp} ERROR trainer.watchdog: hung. {describe(self._own())}.\n{verdict}. Stacks:\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        words = f"error: the job hung. {verdict}.\n       Where every rank stood is in {self.log.parent}."
        print(words, file=sys.stderr, flush=True)
        time.sleep(self.settle)
        os._exit(HUNG)


def read_heartbeat(path: Path) -> Sighting | None:
    """What a rank wrote last; None where it has written nothing."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    fields: dict[str, Any] = json.loads(text)
    return Sighting(**fields)


def who_hung(seen: list[Sighting], stale: float) -> str:
    """In words, which rank most likely holds up the others.

    It is one that has not even written its heartbeat for `stale` seconds longer than others, or else the one whose last
    sign of life is the oldest. Where all stand at the same place nothing tells them apart.
    """
    newest = max(sighting.written for sighting in seen)
    lost = [sighting for sighting in seen if newest - sighting.written > stale]
    if lost:
        return f"{describe(min(lost, key=lambda sighting: sighting.time))}; its process is stopped or lost"
    if len({(sighting.step, sighting.what) for sighting in seen}) > 1:
        return describe(min(seen, key=lambda sighting: sighting.time))
    return f"{describe(seen[0])}, and so did all others"


def describe(sighting: Sighting) -> str:
    """Words for a log: who, how long ago, where."""
    who = f"Rank {sighting.rank} (process {sighting.pid} on {sighting.host})"
    ago = time.time() - sighting.time
    return f"{who} gave its last sign of life {ago:.0f} s ago, after {sighting.step} steps, in {sighting.what}"
