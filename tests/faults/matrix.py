"""What tests of faults share: jobs that die, the same command after them, and a table of what came of it.

Nothing in the product is made for them: the ranks of a test change themselves, or get signals.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections import defaultdict
from dataclasses import dataclass

from ranks import start_ranks
from training_runs import checkpoints, job, make_run, rows, weights_digest

from trainer.checkpoint_folder import problems, step_name, steps_in

STEPS, EVERY = 40, 2
SETTINGS = {
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 99,
    "checkpoint_every": EVERY,
    "global_batch": 6,
    "schedule": "constant",  # so that a longer run begins as a shorter one
}
KILLED = -signal.SIGKILL
FILES = ("rank-0000.safetensors", "rank-0001.safetensors", "state.json", "manifest.json")
"""Of a checkpoint of two ranks."""


def good_steps(run):
    return [step for step in steps_in(checkpoints(run)) if not problems(checkpoints(run) / step_name(step))]


def last_step(run):
    return max((row["step"] for row in rows(run, "train")), default=0)


def resumptions(run):
    """From which steps the jobs of a run went on."""
    log = run / "coarse" / "logs" / "rank-0000.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split("resumed at step ")[1].split()[0]) for line in lines if "resumed at step" in line]


@dataclass
class Record:
    """What came of one kind of fault."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Steps that were done and had to be done again."""
    most: int = 0


class Table:
    """What came of every kind."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = defaultdict(Record)

    def tried(self, kind: str) -> None:
        self.records[kind].tried += 1

    def survived(self, kind: str, lost: int = 0) -> None:
        record = self.records[kind]
        record.survived += 1
        record.lost += lost
        record.most = max(record.most, lost)

    def add(self, other: Table, passed: bool) -> None:
        """What a test has tried; nothing of it counts as survived where the test did not pass to its end."""
        for kind, record in other.records.items():
            self.records[kind].tried += record.tried
            if passed:
                self.records[kind].survived += record.survived
                self.records[kind].lost += record.lost
                self.records[kind].most = max(self.records[kind].most, record.most)

    def lines(self):
        yield f"{'fault':<52} {'tried':>6} {'survived':>9} {'lost steps':>11} {'at most':>8}"
        for kind, record in self.records.items():
            yield f"{kind:<52} {record.tried:>6} {record.survived:>9} {record.lost:>11} {record.most:>8}"


def attempt(function, ranks, run, *arguments, timeout=120, expected=None, **env):
    """Exit codes of a job that goes on from the newest good checkpoint (`expected`, where it is not here), and what it
    prints. When a rank fails the others are told to stop, as the launcher does."""
    expected, before = expected or max(good_steps(run), default=0), resumptions(run)
    log = run.parent / f"log-{len(list(run.parent.glob('log-*')))}"
    running = start_ranks(function, ranks, log, run, *arguments, **env)
    while running.alive():
        if any(process.exitcode for process in running.processes):
            running.send(signal.SIGTERM)
            break
        time.sleep(0.01)
    codes = running.wait(timeout)
    assert resumptions(run)[len(before) :] in ([], [expected])
    return codes, running.output()


def at_random_moments(folder, table, kind, times, seed, whole, disturb, lost):
    """Disturbs one job after another of a run from its start; where that comes to its end, of another run.

    `disturb(ranks, random)` sends the signals; `lost(run, codes, output)` checks what a disturbed job left and returns
    the steps to do again. Each run must end as `whole` did.
    """
    drawn = random.Random(seed)
    for number in itertools.count():
        run = make_run(folder / f"{number}" / "run", steps=STEPS, **SETTINGS)
        while table.records[kind].tried < times:
            running = start_ranks(job, 2, run.parent / "log", run)
            wait_at_random(running, run, drawn)
            disturb(running, drawn)
            codes = running.wait()
            if codes == [0, 0]:  # it had ended before
                break
            table.tried(kind)
            table.survived(kind, lost(run, codes, running.output()))
        else:
            finish(run)
            same(run, whole)
            return
        same(run, whole)


def wait_at_random(running, run, drawn):
    """Waits for a moment that is `drawn`: of a job's start, or after one of its first steps."""
    steps = drawn.randint(0, 8)
    last = last_step(run) + steps
    while steps and running.alive() and last_step(run) < last:
        time.sleep(0.02)
    time.sleep(drawn.uniform(0, 0.1 if steps else 3))


def finish(run, ranks=2, function=job, arguments=(), **env):
    """The same command, to the end; returns how many steps it did again."""
    lost = last_step(run) - max(good_steps(run), default=0)
    codes, output = attempt(function, ranks, run, *arguments, **env)
    assert codes == [0] * ranks, output
    return lost


def same(run, other):
    """The run ended as the other did: weights and losses, bit for bit."""
    losses = [{row["step"]: row["loss"] for row in rows(folder, "train")} for folder in (run, other)]
    assert losses[0] == losses[1]
    assert weights_digest(run) == weights_digest(other)


def damage_file(path, how):
    if how == "folder gone":
        shutil.rmtree(path)
    elif how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "one byte flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def all_say(codes, output, words, code=2):
    """Every rank ended with that code and the same message."""
    assert codes == [code] * len(codes), output
    said = [part.partition("error: ")[2] for part in output.split("--- rank-")[1:]]
    assert words in " ".join(said[0].split()), output
    assert len({" ".join(text.split()) for text in said}) == 1, output
