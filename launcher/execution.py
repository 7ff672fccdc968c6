"""One pass over the stages to build, from here: each starts when it is ready and there is room for it, is watched, and
is started again where that helps. What a launcher that was killed has left running is taken over."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launcher import restarts
from launcher.backends import Job
from launcher.backends.direct import Direct
from launcher.display import Display
from launcher.graph import Origin, StageState
from launcher.outcome import BUSY_PORT, again_from, got_on, how_far, make_way, not_made, why
from launcher.placement import Share, count, in_words
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.room import Room
from launcher.run_folder import DIRECT, RunFolder, remember
from launcher.stage import Stage
from launcher.units import duration
from model.errors import UserError
from trainer.exit_codes import SAVED

STOP_SECONDS = 60
"""How long stages may take to save when told to stop."""
POLL_SECONDS = 0.2
INTERRUPTED = 130


@dataclass
class Running:
    """A stage that runs."""

    stage: Stage
    handle: str
    share: Share
    log: Path
    log_start: int
    """Where this attempt's output begins."""
    started: float
    begun_at: int | None
    """How far the stage was when it started."""
    growing: bool = False
    """Whether it was told to save so that it can go on with more hosts."""

    def output(self) -> str:
        """What this attempt has printed; nothing where somebody has removed the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(self.log_start)
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


@dataclass
class Tries:
    """What has been tried for one stage."""

    attempts: int = 0
    failures: int = 0
    """Restarts in a row without a new checkpoint."""
    not_before: float = 0.0
    """When the next attempt may begin, on the monotonic clock."""


class Execution:
    """Signals to stop are heeded throughout: the first lets stages save, the second does not."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        found: Mapping[str, Origin],
        states: Mapping[str, StageState],
        todo: Sequence[Stage],
        console: Console,
        backend: Direct,
        room: Room,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.origins = found
        self.outdated = {name: state.reasons for name, state in states.items() if state.state == "outdated"}
        self.waiting = list(todo)
        self.running: list[Running] = []
        self.tries = {stage.name: Tries() for stage in todo}
        self.backend = backend
        self.room = room
        self.display = Display(console, folder.path / "progress")
        self.code = 0
        self.stops = 0
        self.stuck = False
        """Whether it has been said that nothing can run until a host is back."""

    def run(self) -> int:
        """Builds the stages and returns the exit code. A failed stage lets those that run go on, also where they must
        be started again, but no other is started."""
        with self._heeding_signals(), self.display:
            self._take_over()
            try:
                while self.running or self._more():
                    self._start_ready()
                    self.display.update([job.stage.name for job in self.running])
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    self._look_for_hosts()
                    if self.stops:
                        self._stop_all()
            finally:
                self.room.close()  # after a fault of ours what runs goes on: the same command takes it over
        if self.stops:
            self.display.say("Stopped. Nothing that was finished or saved is lost: the same command continues.")
        return INTERRUPTED if self.stops else self.code

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        def heed(number: int, frame: object) -> None:
            self.stops += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, heed) for number in numbers}
        try:
            yield
        finally:
            if not self.stops:  # else this process is about to end, and a signal that comes late must not change how
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _more(self) -> bool:
        """Whether anything that waits may still be started."""
        return not self.stops and any(not self.code or self.tries[stage.name].attempts for stage in self.waiting)

    def _take_over(self) -> None:
        """What still runs from an earlier launcher is watched as if this one had started it."""
        for stage in list(self.waiting):
            entry = self.folder.entry(stage.name)
            if entry.get("state") != "running":
                continue
            share = self.room.again(entry["hosts"])
            log = self.backend.logs(entry["job"])
            started = time.monotonic() - (time.time() - entry["started"])
            self.waiting.remove(stage)
            running = Running(stage, entry["job"], share, log, entry["log_start"], started, entry["begun_at"])
            self.running.append(running)
            self.tries[stage.name].attempts = entry.get("attempt", 1)
            self.display.begin(stage.name, "before, and taken over")

    def _begun(self) -> bool:
        """Whether anything that has begun pauses, or saves in order to grow: until it goes on its room is not for
        others."""
        pauses = any(self.tries[stage.name].attempts for stage in self.waiting)
        return pauses or any(job.growing for job in self.running)

    def _start_ready(self) -> None:
        unfinished = {stage.name for stage in self.waiting} | {job.stage.name for job in self.running}
        begun = self._begun()
        for stage in list(self.waiting):
            tries = self.tries[stage.name]
            held = time.monotonic() < tries.not_before if tries.attempts else begun or self.code
            if self.stops or held or unfinished & set(stage.needs):
                continue
            share = self.room.take(stage, begun=tries.attempts > 0)
            if share is not None:
                self.waiting.remove(stage)
                self.stuck = False
                self._start(stage, share)
            elif not self.running and not self.stuck:
                self.stuck = True
                self.display.say(f"{stage.name}: there is no host left to run it; waiting until one can be reached.")

    def _start(self, stage: Stage, share: Share) -> None:
        name, path, tries = stage.name, self.folder.path, self.tries[stage.name]
        reasons = self.outdated.pop(name, None)
        try:
            previous = make_way(self.folder, stage, self.origins[name], reasons is not None)
        except UserError as error:
            self.room.release(share)
            self._note_failure(stage, str(error), 2)
            return
        if previous is not None:
            self.display.say(f"{name}: outdated ({escape('; '.join(reasons or ()))}); moved to {escape(str(previous))}")
        tries.attempts += 1
        log = path / "logs" / f"{name}.log"
        log_start, begun_at = log.stat().st_size if log.exists() else 0, how_far(path, stage)
        (path / "progress" / f"{name}.json").unlink(missing_ok=True)
        noted = {"hosts": in_words(share), "attempt": tries.attempts, "log_start": log_start, "begun_at": begun_at}
        origin = self.origins[name].to_json()
        self.folder.record(
            name, state="running", started=time.time(), made_from=origin, job=None, backend=DIRECT, **noted
        )
        job = Job(path, self.recipe, stage, share, tries.attempts)
        handle = self.backend.submit(job, lambda handle: self.folder.record(name, job=handle))
        self.running.append(Running(stage, handle, share, log, log_start, time.monotonic(), begun_at))
        self.display.begin(name, self.room.where(share))

    def _collect(self) -> None:
        """Takes note of the stages that have ended."""
        for job in list(self.running):
            ended = self.backend.poll(job.handle)
            if ended is None:
                continue
            self.running.remove(job)
            self.room.release(job.share)
            self.display.end(job.stage.name)
            self._note_end(job, ended)
            for host in ended.lost:
                self.room.lose(host)
                self.display.say(f"[yellow]{host}[/] can no longer be reached; it is left out until it can.")
            if ended.code == 0:
                self._check_made(job)
            elif self.stops:
                self.folder.record(job.stage.name, state="interrupted")
            elif job.growing and not ended.lost and ended.code not in restarts.FINAL:
                # It has saved, though the deepspeed command, told to stop as well, ends with a code of its own.
                self._again(job.stage, 0.0, "more hosts are there")
            else:
                self._mend(job, ended)

    def _note_end(self, job: Running, ended: Ended) -> None:
        seconds = time.monotonic() - job.started
        total = (self.folder.entry(job.stage.name).get("seconds") or 0) + seconds
        self.folder.record(job.stage.name, job=None, finished=time.time(), seconds=round(total, 3))
        attempt = self.tries[job.stage.name].attempts
        remember(self.folder.path, job.stage.name, attempt, in_words(job.share), seconds, ended.code, ended.lost)

    def _check_made(self, job: Running) -> None:
        wrong = not_made(self.folder.path, job.stage, self.origins[job.stage.name])
        if wrong is not None:
            self._note_failure(job.stage, wrong, 1, job)
            return
        self.folder.record(job.stage.name, state="done", error=None)
        self.display.say(f"{job.stage.name}: done in {duration(time.monotonic() - job.started)}")

    def _mend(self, job: Running, ended: Ended) -> None:
        """Starts a stage again whose job has failed, or notes why not."""
        tries = self.tries[job.stage.name]
        output = job.output()
        # Each attempt has another port, so that it is no fault of the program, whichever attempt it was.
        if job.stage.ranked and tries.failures <= self.recipe.restarts.limit and BUSY_PORT.search(output):
            tries.failures += 1
            self._again(job.stage, 0.0, "its port was taken; trying another")
            return
        message, code = why(job.stage, self.folder.path, output, ended.code)
        progressed = got_on(job.begun_at, how_far(self.folder.path, job.stage))
        pause = restarts.restart_after(ended, tries.failures, progressed, self.recipe.restarts)
        if (code == 2 and not ended.lost) or pause is None:
            self._note_failure(job.stage, message, code, job)
            return
        tries.failures = (0 if progressed else tries.failures) + 1
        self._again(job.stage, pause, restarts.in_words(ended) if ended.lost or ended.code == SAVED else message)

    def _again(self, stage: Stage, pause: float, words: str) -> None:
        self.tries[stage.name].not_before = time.monotonic() + pause
        self.folder.record(
            stage.name, state="waiting", error=words, restarts=(self.folder.entry(stage.name).get("restarts") or 0) + 1
        )
        self.waiting.insert(0, stage)
        when = f" in {duration(pause)}" if pause else ""
        self.display.say(f"{stage.name}: {escape(words)}; it {again_from(self.folder.path / stage.name)}{when}")

    def _note_failure(self, stage: Stage, message: str, code: int, job: Running | None = None) -> None:
        name = stage.name
        self.code = 1 if 1 in (code, self.code) else 2
        self.folder.record(name, state="failed", error=message)
        self.display.say(f"[red]{name} failed:[/] {escape(message)}")
        if job and code == 1:
            again = again_from(self.folder.path / name)
            self.display.say(f"Its log is {escape(str(job.log))}; the same command {again}.")
        if self.running:
            others = ", ".join(other.stage.name for other in self.running)
            self.display.say(f"Waiting for {others} to end; nothing new is started.")

    def _look_for_hosts(self) -> None:
        """Hosts that are back take part again: what runs on fewer than it asked for saves, and goes on with more; one
        after the other, since two could count on the same room."""
        for host in self.room.returned():
            self.display.say(f"[green]{host}[/] is back.")
        for job in self.running:
            if job.stage.trained and not self._begun() and self.room.could_grow(job.stage, job.share):
                job.growing = True
                self.display.say(f"{job.stage.name}: is saving, to go on with more than {count(job.share)} ranks")
                self.backend.cancel(job.handle)

    def _stop_all(self) -> None:
        """Tells what runs to save and end, and waits for it; at a second signal, or when time is up, ends it."""
        self.display.say("Stopping: what trains is saving its state. Press Ctrl-C again not to wait.")
        for job in self.running:
            self.backend.cancel(job.handle)
        deadline, ended = time.monotonic() + STOP_SECONDS, False
        while self.running:
            if not ended and (time.monotonic() > deadline or self.stops > 1):
                ended = True
                for job in self.running:
                    self.backend.cancel(job.handle, now=True)
            time.sleep(POLL_SECONDS)
            self._collect()
