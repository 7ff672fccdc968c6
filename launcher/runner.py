"""Running a recipe on this machine: what is not up to date is made, stage by stage, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data.processes import disk_full
from launcher.display import Display
from launcher.graph import STAGE_FILE, Origin, StageState, origins, plan_stages, problems, state_of
from launcher.places import check_places
from launcher.processes import Machine, environment, stage_command, start
from launcher.recipe import Recipe
from launcher.run_folder import RunFolder, check_owner
from launcher.stage import Stage
from launcher.units import duration
from model import artifact
from model.config import STAGES as TRAINED
from model.counting import count_stage, token_fields
from model.errors import UserError
from model.fields import CONDITIONING, SEMANTIC
from trainer.exit_codes import DIVERGED, HUNG, SAVED

STOP_SECONDS = 60
"""How long stages may take to save when told to stop."""
POLL_SECONDS = 0.2
INTERRUPTED = 130
BUSY_PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
FULL_BYTES = 1_000_000
"""A disk with less free is full, whatever the library that failed on it says."""
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)$")


def run(
    recipe: Recipe, path: Path, only: Sequence[str] = (), dry_run: bool = False, console: Console | None = None
) -> int:
    """Brings the run folder `path` up to date with `recipe`, or only the stages in `only`. Returns the exit code:
    0, 1 when a stage failed, 2 when it failed by something the user can put right, 130 when interrupted.

    Raises UserError for what can be said before anything starts.
    """
    console = console or Console()
    if dry_run:
        check_owner(path, recipe)
        states = state_of(path, recipe)
        _print_plan(console, states, plan_stages(states, only))
        return 0
    # Taken once: the user's files may change while the run goes on.
    found = origins(recipe)
    with RunFolder.opened(path, recipe) as folder:
        states = state_of(folder.path, recipe, found)
        todo = plan_stages(states, only)
        folder.check_space(space_needed(recipe, todo))
        check_places(recipe, found, todo)
        folder.adopt(recipe)
        _note_states(folder, found, states, todo)
        if todo:
            code = Execution(folder, recipe, found, states, todo, console).run()
            if code:
                return code
        else:
            what = f"{', '.join(only)} " if only else "everything "
            console.print(f"{path}: {what}is up to date.", highlight=False, soft_wrap=True, markup=False)
        if all(state.done for state in state_of(folder.path, recipe, found).values()):
            _report(folder.path, list(states), console)
        return 0


def _print_plan(console: Console, states: dict[str, StageState], todo: list[Stage]) -> None:
    building = {stage.name for stage in todo}
    for name, state in states.items():
        verb = "keep" if state.done else "build" if state.state == "missing" else "rebuild"
        verb = "resume" if state.state == "partial" else verb
        verb = verb if state.done or name in building else "leave"
        reasons = f": {'; '.join(state.reasons)}" if state.reasons else ""
        console.print(f"{name:<11} {verb:<8} {state.state}{escape(reasons)}", highlight=False, soft_wrap=True)


def _note_states(folder: RunFolder, found: dict[str, Origin], states: dict[str, StageState], todo: list[Stage]) -> None:
    """Records which stages are kept and which wait."""
    for name, state in states.items():
        if state.done:
            folder.record(name, state="done", reused=True, error=None, made_from=found[name].to_json())
        elif name in {stage.name for stage in todo}:
            folder.record(name, state="waiting", reused=False, error=None)


def _report(run: Path, names: Sequence[str], console: Console) -> None:
    """Prints the figures of a finished run, after writing its report unless there is one newer than all it shows."""
    from launcher.report import print_summary, write_report

    report = run / "report.html"
    newest = max((run / name / artifact.MANIFEST).stat().st_mtime for name in names)
    if not report.exists() or report.stat().st_mtime < newest:
        write_report(run)
    print_summary(run, console)


def space_needed(recipe: Recipe, todo: Sequence[Stage]) -> int:
    """A rough lower bound on the bytes that `todo` will write: audio of the built-in corpus, checkpoints, weights."""
    names = {stage.name for stage in todo}
    needed = 0
    if "corpus" in names and recipe.data.audio is None:
        needed += int(recipe.data.clips * recipe.data.clip_seconds * recipe.data.sample_rate * 2)
    fields = token_fields(recipe.encoders, recipe.quantizers)
    dims = {CONDITIONING: recipe.encoders.joint.dim, SEMANTIC: recipe.encoders.joint.dim}
    for name in TRAINED:
        stage = getattr(recipe.stages, name)
        parameters = count_stage(stage.model, fields, dims).parameters
        weights = 2 * 4 * parameters  # the stage's own and the bundle's
        # A checkpoint has bf16 weights and three fp32 copies; the oldest goes only after a new one is there.
        checkpoints = (stage.train.keep_last + 1) * 14 * parameters
        needed += weights + checkpoints if name in names else 0
    return needed


@dataclass
class Job:
    """A stage that runs."""

    stage: Stage
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    log_start: int
    """Where this attempt's output begins."""
    started: float
    attempt: int

    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")


class Execution:
    """One pass over the stages to build, as many at once as the recipe says. Signals to stop are heeded throughout."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        found: dict[str, Origin],
        states: dict[str, StageState],
        todo: Sequence[Stage],
        console: Console,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.origins = found
        self.outdated = {name: state.reasons for name, state in states.items() if state.state == "outdated"}
        self.waiting = list(todo)
        self.running: list[Job] = []
        self.machine = Machine.here()
        self.display = Display(console, folder.path / "progress")
        self.code = 0
        self.stops = 0
        """Signals to stop so far: the first lets stages save, the second does not."""

    def run(self) -> int:
        """Builds the stages and returns the exit code. A failed stage lets those that run go on, but starts no more."""
        with self._heeding_signals(), self.display:
            try:
                while self.running or (self.waiting and not self.code and not self.stops):
                    self._start_ready()
                    self.display.update([job.stage.name for job in self.running])
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    if self.stops:
                        self._stop_all()
            finally:
                for job in self.running:  # only after a fault of ours
                    _signal_group(job, signal.SIGKILL)
        if self.stops:
            self.display.say("Stopped. Nothing that was finished or saved is lost: the same command continues.")
        return INTERRUPTED if self.stops else self.code

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        def heed(number: int, frame: object) -> None:
            self.stops += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, heed) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_ready(self) -> None:
        unfinished = {stage.name for stage in self.waiting} | {job.stage.name for job in self.running}
        for stage in list(self.waiting):
            free = set(range(self.recipe.parallel)) - {job.slot for job in self.running}
            if self.stops or self.code or not free:
                return
            if not unfinished & set(stage.needs):
                self.waiting.remove(stage)
                self._start(stage, min(free))

    def _start(self, stage: Stage, slot: int, attempt: int = 1) -> None:
        origin, path = self.origins[stage.name], self.folder.path
        try:
            self._make_way(stage, origin)
        except UserError as error:
            self._note_failure(stage.name, str(error), 2)
            return
        (path / "progress" / f"{stage.name}.json").unlink(missing_ok=True)
        machine = self.machine.share(slot, self.recipe.parallel)
        command, processes = stage_command(stage, path, self.recipe, machine)
        log = path / "logs" / f"{stage.name}.log"
        log_start = log.stat().st_size if log.exists() else 0
        self.folder.record(stage.name, state="running", started=time.time(), made_from=origin.to_json(), pid=None)
        process = start(command, environment(machine, processes), path, log)
        self.folder.record_process(stage.name, process.pid)
        self.running.append(Job(stage, process, slot, log, log_start, time.monotonic(), attempt))
        self.display.begin(stage.name)

    def _make_way(self, stage: Stage, origin: Origin) -> None:
        """Moves an outdated artifact aside; a trained stage's checkpoints stay where they fit what is asked for.

        Raises UserError where another job works in it.
        """
        reasons = self.outdated.pop(stage.name, None)
        if reasons is not None and (previous := self.folder.set_aside(stage.name)):
            self.folder.record(stage.name, seconds=0)
            self.display.say(f"{stage.name}: outdated ({escape('; '.join(reasons))}); moved to {escape(str(previous))}")
        if stage.trained:
            folder = self.folder.path / stage.name
            folder.mkdir(exist_ok=True)
            artifact.write_json(folder / STAGE_FILE, {"fingerprint": origin.fingerprint})

    def _collect(self) -> None:
        """Takes note of the stages that have ended."""
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                continue
            self.running.remove(job)
            self.display.end(job.stage.name)
            seconds = time.monotonic() - job.started
            total = (self.folder.entry(job.stage.name).get("seconds") or 0) + seconds
            self.folder.record(job.stage.name, pid=None, finished=time.time(), seconds=round(total, 3))
            if code == 0:
                self._check_made(job, seconds)
            elif self.stops:
                self.folder.record(job.stage.name, state="interrupted")
            elif job.stage.ranked and job.attempt == 1 and BUSY_PORT.search(job.output()):
                self.display.say(f"{job.stage.name}: its port was taken; trying another")
                self._start(job.stage, job.slot, attempt=2)
            elif code == SAVED:
                self.stops += 1
                self.folder.record(job.stage.name, state="interrupted")
            else:
                self._fail(job, code)

    def _check_made(self, job: Job, seconds: float) -> None:
        name = job.stage.name
        found, wrong = problems(self.folder.path / name, job.stage)
        if wrong or found != self.origins[name].fingerprint:
            self._note_failure(name, f"it ended without its artifact: {(wrong or ['another fingerprint'])[0]}", 1, job)
            return
        self.folder.record(name, state="done")
        self.display.say(f"{name}: done in {duration(seconds)}")

    def _fail(self, job: Job, code: int) -> None:
        output = job.output()
        message = user_message(output) if code in (2, DIVERGED, HUNG) else None
        if DISK_FULL.search(output) or shutil.disk_usage(self.folder.path).free < FULL_BYTES:
            message = disk_full(self.folder.path)
        if message is not None:
            self._note_failure(job.stage.name, message, 1 if code == HUNG else 2, job)
        else:
            self._note_failure(job.stage.name, gist(output, code, first=job.stage.ranked), 1, job)

    def _note_failure(self, name: str, message: str, code: int, job: Job | None = None) -> None:
        self.code = 1 if 1 in (code, self.code) else 2
        self.folder.record(name, state="failed", error=message)
        self.display.say(f"[red]{name} failed:[/] {escape(message)}")
        if job and code == 1:
            again = again_from(self.folder.path / name)
            self.display.say(f"Its log is {escape(str(job.log))}; the same command {again}.")
        if self.running:
            others = ", ".join(other.stage.name for other in self.running)
            self.display.say(f"Waiting for {others} to end; nothing new is started.")

    def _stop_all(self) -> None:
        """Tells what runs to save and end, and waits for it; at a second signal, or when time is up, kills it."""
        self.display.say("Stopping: what trains is saving its state. Press Ctrl-C again not to wait.")
        for job in self.running:
            _signal_group(job, signal.SIGTERM)
        deadline, asked = time.monotonic() + STOP_SECONDS, self.stops
        while self.running:
            if time.monotonic() > deadline or self.stops > asked:
                for job in self.running:
                    _signal_group(job, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
            self._collect()


def _signal_group(job: Job, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, number)
