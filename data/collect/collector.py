"""`stretto collect`: everything a manifest names, fetched by a few threads into one folder."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from data.collect import sites
from data.collect.failure import Failure, Stopped, Transient
from data.collect.fetch import PAGE, Fetcher, audio_suffix, user_agent
from data.collect.hosts import Hosts, Visit
from data.collect.limits import Limits
from data.collect.manifest import Manifest, Source, read_manifest
from data.collect.partial import Partial
from data.collect.record import MANIFEST, Record
from data.lock import locked
from data.progress import Progress
from model.errors import UserError

REPORT_SECONDS = 0.25
STOP_SECONDS = 3.0
"""At a stop, threads that wait for a server are given this long to notice. They end with the process, which harms
nothing."""
SPEED_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """What a collection came to. `failures` counts addresses by reason, `examples` has one of each."""

    manifest: Path
    addresses: int
    here: int
    bytes: int
    failures: Counter[str]
    examples: dict[str, str]
    stopped: bool


@dataclass
class _Task:
    source: Source
    attempts: int = 0


def collect(manifest: Path, folder: Path, limits: Limits, progress: Progress) -> Outcome:
    """Fetches what `manifest` names into `folder`, and writes `folder`/manifest.jsonl: its rows with path and digest.

    What is there already is not fetched again, and what is there in part is gone on with. What cannot be fetched is
    listed in `folder`/failed.jsonl. An interrupt (KeyboardInterrupt) ends it early, with `stopped` in the outcome.
    Raises UserError when the manifest or the folder cannot be used.
    """
    sources = read_manifest(manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder} cannot be a folder: {error.strerror}. Name another with -o.") from None
    with locked(folder):
        record = Record(folder, sources)
        try:
            stopped = _Collector(sources, record, limits, progress).run()
        finally:
            record.close()
            record.write_manifest(sources.sources)
    return _outcome(sources, record, stopped)


class _Collector:
    """The threads and what they share."""

    def __init__(self, manifest: Manifest, record: Record, limits: Limits, progress: Progress) -> None:
        self._sources = manifest.sources
        self._total = len(manifest.sources) + len(manifest.faults)
        self._record = record
        self._limits = limits
        self._progress = progress
        self._speed = _Speed()
        self._hosts: Hosts[_Task] = Hosts(limits.per_second, limits.per_host)
        self._fetcher = Fetcher(self._hosts, limits, self._speed.count)
        self._fault: BaseException | None = None

    def run(self) -> bool:
        """Fetches everything; returns whether it was stopped before the end."""
        for source in self._sources:
            if not self._record.has(source):
                self._hosts.put(_Task(source), source.host)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._limits.connections)]
        for thread in threads:
            thread.start()
        interrupted = False
        try:
            while any(thread.is_alive() for thread in threads) and not self._fault:
                self._report()
                time.sleep(REPORT_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
        self._hosts.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._fault:
            raise self._fault
        self._report()
        return interrupted

    def _report(self) -> None:
        self._progress.update(self._record.settled, self._total, "collecting", **{"bytes/s": self._speed.now()})

    def _work(self) -> None:
        """What each thread does until there is nothing left. A fault of ours or of the disk stops them all."""
        try:
            while taken := self._hosts.take():
                task, visit = taken
                try:
                    self._attempt(task, visit)
                finally:
                    visit.leave()
                    self._hosts.finish()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  the thread that waits for this one raises it
            self._fault = error
            self._hosts.stop()

    def _attempt(self, task: _Task, visit: Visit) -> None:
        task.attempts += 1
        source, partial = task.source, self._record.partial(task.source)
        try:
            if audio_suffix(source.url) is None and sites.knows(source.url):
                partial, suffix = self._from_site(source, partial, visit)
            else:
                suffix = self._from_file(source, partial, visit)
            self._record.keep(source, partial, suffix)
        except Transient as failure:
            if task.attempts < self._limits.attempts:
                backoff = self._limits.backoff * 2 ** (task.attempts - 1) * random.uniform(0.5, 1.5)
                self._hosts.put(task, source.host, max(failure.wait or 0.0, backoff))
            else:
                self._fail(task, failure)
        except Failure as failure:
            partial.drop()
            self._fail(task, failure)

    def _from_file(self, source: Source, partial: Partial, visit: Visit) -> str:
        try:
            return self._fetcher.fetch(source.address, partial, visit)
        except Failure as failure:
            if failure.reason != PAGE:
                raise
            missing = "of no site that yt-dlp knows" if sites.installed() else f"for sites: {sites.EXTRA}"
            raise Failure(PAGE, f"{failure.detail}; {missing}") from None

    def _from_site(self, source: Source, partial: Partial, visit: Visit) -> tuple[Partial, str]:
        visit.spend()
        path = sites.fetch(source.address, partial.path, user_agent(), self._hosts, self._limits, self._speed.count)
        return Partial(path), path.suffix

    def _fail(self, task: _Task, failure: Failure) -> None:
        self._record.fail(task.source.url, [row.line for row in task.source.rows], failure, task.attempts)


class _Speed:
    """Bytes a second over the last few seconds. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: deque[tuple[float, int]] = deque()
        self._begun = time.monotonic()

    def count(self, size: int) -> None:
        with self._lock:
            self._arrived.append((time.monotonic(), size))

    def now(self) -> float:
        with self._lock:
            now = time.monotonic()
            while self._arrived and self._arrived[0][0] < now - SPEED_SECONDS:
                self._arrived.popleft()
            return sum(size for _, size in self._arrived) / max(0.1, min(SPEED_SECONDS, now - self._begun))


def _outcome(manifest: Manifest, record: Record, stopped: bool) -> Outcome:
    here = [source for source in manifest.sources if record.has(source)]
    stored = {record.files[source.url].path: record.files[source.url].bytes for source in here}
    return Outcome(
        manifest=record.folder / MANIFEST,
        addresses=len(manifest.sources) + len(manifest.faults),
        here=len(here),
        bytes=sum(stored.values()),
        failures=record.failures,
        examples=record.examples,
        stopped=stopped,
    )
