"""`python -m launcher.slurm_job --run RUN --stage STAGE`: the batch step of a stage's Slurm job.

It starts the ranks with srun, passes on to them that the time limit is near, and when they have ended says in
RUN/jobs/STAGE.json how; a stage that is to go on is put back into the queue. Exit code 0 lets the jobs start that
depend on this one, any other ends them.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from data.lock import PATIENCE
from data.processes import plain_errors
from launcher import restarts
from launcher.attempts import Attempts
from launcher.backends.slurm import job_log
from launcher.backends.slurm_commands import ask, hostnames, tasks_per_node
from launcher.graph import Origin, stage_named
from launcher.outcome import BUSY_PORT, got_on, how_far, not_made, why
from launcher.placement import Part, in_words
from launcher.processes import LOCK_SECONDS
from launcher.recipe import read_run_recipe
from launcher.restarts import Ended
from launcher.run_folder import read_state
from launcher.stage import Stage
from model.errors import UserError
from trainer.exit_codes import SAVED

FAILED_TASK = re.compile(
    rb"^srun: error: \S+: tasks? [\d,-]+: (?:Exited with exit code (\d+)|(\w[\w ]*))", re.MULTILINE
)
"""How srun says, in the order in which it happens, that ranks have ended badly."""
LOST_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.M)
SIGNALS = {text: 128 + number for number in signal.valid_signals() if (text := signal.strsignal(number))}
REQUEUE_SECONDS = 60
"""In which Slurm ends a job that is put back into the queue."""


def main() -> int:
    told = Told()
    parser = argparse.ArgumentParser(prog="python -m launcher.slurm_job", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder made by `stretto run`")
    parser.add_argument("--stage", required=True)
    arguments = parser.parse_args()
    with plain_errors(arguments.run):
        return Attempt(arguments.run, stage_named(arguments.stage), told).go()


class Told:
    """Signals that this process gets: SIGUSR1 that the time limit is near, SIGTERM that the job is to end for good.

    Slurm itself sends SIGTERM to the ranks too where it ends a job; to tell them twice does no harm.
    """

    def __init__(self) -> None:
        self.anything = False
        self.to_end = False
        self.srun: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._heed)

    def _heed(self, number: int, frame: object) -> None:
        self.anything, self.to_end = True, self.to_end or number == signal.SIGTERM
        what = "to end" if self.to_end else "that its time is nearly up"
        os.write(2, f"this job is told {what}; its ranks save\n".encode())  # print may be interrupted by itself
        if self.srun is not None and self.srun.poll() is None:
            # srun passes SIGUSR1 on; by SIGTERM it would kill the ranks.
            self.srun.send_signal(signal.SIGUSR1)


@dataclass
class Attempt:
    """One time that Slurm starts the job of a stage; put back into the queue it keeps its number."""

    run: Path
    stage: Stage
    told: Told
    job: str = field(default_factory=lambda: os.environ["SLURM_JOB_ID"])

    def __post_init__(self) -> None:
        self.log = job_log(self.run, self.stage.name)
        self.folder = self.run / self.stage.name
        self.attempts = Attempts(self.run, self.stage.name, self.job)
        self.begun_at = how_far(self.run, self.stage)
        self.restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def go(self) -> int:
        """Returns the exit code of the job."""
        hosts = in_words(tuple(Part(host, tuple(range(tasks)), tasks) for host, tasks in self._nodes()))
        self.attempts.begin(hosts, self.restarted + 1)
        code, output = self._attempt()
        if code != 0 and self.stage.ranked and not self.told.to_end and BUSY_PORT.search(output):
            code, output = self._attempt()  # another step of the job has another port
        ended = Ended(code, tuple(LOST_NODE.findall(output)))
        self.attempts.end(ended.code, ended.lost)
        return self._conclude(ended, output)

    def _nodes(self) -> list[tuple[str, int]]:
        hosts, tasks = os.environ["SLURM_JOB_NODELIST"], os.environ["SLURM_TASKS_PER_NODE"]
        return list(zip(hostnames(hosts), tasks_per_node(tasks), strict=True))

    def _attempt(self) -> tuple[int, str]:
        """Runs the ranks; returns the code of the first that failed, or 0, and what they printed."""
        begins = self.log.stat().st_size if self.log.exists() else 0
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.restarted:
            env[PATIENCE] = str(LOCK_SECONDS)
        self.told.srun = subprocess.Popen(self._command(), env=env, stdin=subprocess.DEVNULL)
        if self.told.anything:  # before there was an srun to pass it on to
            self.told.srun.send_signal(signal.SIGUSR1)
        code = self.told.srun.wait()
        output = self.log.read_bytes()[begins:] if self.log.exists() else b""
        first = FAILED_TASK.search(output)
        if code and first is not None:
            # srun itself ends with the largest: that of a rank it has killed because another failed.
            code = int(first[1]) if first[1] else SIGNALS.get(first[2].decode(), code)
        return code if code >= 0 else 128 - code, output.decode(errors="replace")

    def _command(self) -> list[str]:
        module = "trainer" if self.stage.trained else "launcher.worker"
        options = ["--export=ALL", "--kill-on-bad-exit=1", "--wait=0"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            options.append(f"--cpus-per-task={cpus}")  # srun does not take it over by itself
        rank = [sys.executable, "-m", "launcher.slurm_rank", module, "--run", str(self.run), "--stage", self.stage.name]
        return ["srun", *options, *rank]

    def _conclude(self, ended: Ended, output: str) -> int:
        made_from = read_state(self.run)["stages"][self.stage.name]["made_from"]
        if ended.code == 0:
            wrong = not_made(self.run, self.stage, Origin(**made_from))
            return self._fail(wrong, 1) if wrong else self._done()
        if self.told.to_end:
            says = self._slurm_says()
            if int(says["Restarts"]) > self.restarted:
                self.attempts.say(state="waiting", error="Slurm has put it back into the queue")
                return SAVED
            if says["Reason"] != "TimeLimit":
                self.attempts.say(state="interrupted", error=None)
                return SAVED
        message, kind = why(self.stage, self.run, output, ended.code)
        progressed = got_on(self.begun_at, how_far(self.run, self.stage))
        failures = 0 if progressed else self.attempts.before.get("failures", 0)
        again = restarts.restart_after(ended, failures, progressed, read_run_recipe(self.run).restarts)
        if (kind == 2 and not ended.lost) or again is None:
            return self._fail(message, kind)
        saved = "it saved, to go on when it is its turn again" if ended.code == SAVED else message
        return self._requeue(saved, failures + 1)

    def _done(self) -> int:
        self.attempts.say(state="done", error=None)
        stages = read_state(self.run)["stages"]
        if all(entry.get("state") == "done" for entry in stages.values()):
            from launcher.report import write_report

            write_report(self.run)
        return 0

    def _fail(self, message: str, code: int) -> int:
        print(f"{self.stage.name} failed: {message}", file=sys.stderr, flush=True)
        self.attempts.say(state="failed", error=message, code=code)  # that of the ranks may be 0 or SAVED
        return code

    def _requeue(self, words: str, failures: int) -> int:
        """Puts this job back into the queue, which ends this process; its number stays, and so do those that wait for
        it."""
        self.attempts.say(state="waiting", error=words, failures=failures)
        print(f"{self.stage.name}: {words}; job {self.job} is put back into the queue", file=sys.stderr, flush=True)
        try:
            ask("scontrol", "requeue", self.job)
        except UserError as error:
            return self._fail(f"{words}, but Slurm does not start it again: {error}", 1)
        time.sleep(REQUEUE_SECONDS)
        return SAVED

    def _slurm_says(self) -> dict[str, str]:
        """How this job stands, in Slurm's own words."""
        words = ask("scontrol", "show", "job", self.job, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words)


if __name__ == "__main__":
    sys.exit(main())
