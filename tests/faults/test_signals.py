"""SIGTERM to one rank, whatever it is at; a rank that SIGSTOP holds up, for good or for a while."""

from __future__ import annotations

import os
import pkgutil
import signal
import time

import psutil
import pytest
from faults.matrix import KILLED, STEPS, at_random_moments, attempt, finish, good_steps, last_step, same
from ranks import start_ranks
from training_runs import job

from trainer.exit_codes import HUNG, SAVED

PLACES = {
    "building the model": ("trainer.setup:StageSetup", "build_model", 1),
    "loading a checkpoint": ("trainer.checkpoint:Checkpointer", "load", 1),
    "taking a batch": ("trainer.batches:TrainingBatches", "take", 3),
    "in a step": ("trainer.spikes:SpikeGuard", "judge", 3),
    "in a validation": ("trainer.engine:Engine", "evaluate", 3),
    "copying for a save": ("trainer.checkpoint:Checkpointer", "_copy", 2),
    "writing a checkpoint": ("trainer.checkpoint", "write_tensors", 2),
    "finishing a save": ("trainer.checkpoint", "raise_alike", 1),
}
"""A method or function, and at which of its calls a signal comes."""
HELD = ("taking a batch", "in a step", "in a validation", "copying for a save", "writing a checkpoint")


def disturbed(run, rank, owner, name, call, number):
    """A job of which `rank` gets a signal as that function is called for the `call`-th time."""
    if os.environ["RANK"] == str(rank):
        owner, calls = pkgutil.resolve_name(owner), []
        function = getattr(owner, name)

        def with_signal(*arguments, **named):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return function(*arguments, **named)

        setattr(owner, name, with_signal)
    return job(run)


def disturb(run, rank, place, number):
    return start_ranks(disturbed, 2, run.parent / "disturbed", run, rank, *PLACES[place], number)


def cases(places, *sample):
    """Each rank in each place; those in `sample` are for `make test`, the others for `make faults`."""
    every = [(rank, place) for place in places for rank in (0, 1)]
    return [pytest.param(*case, marks=[] if case in sample else [pytest.mark.faults]) for case in every]


@pytest.mark.parametrize(("rank", "place"), cases(PLACES, (0, "writing a checkpoint")))
def test_sigterm_to_one_rank(started, alone, table, rank, place):
    """All save and end at the same step; nothing is lost."""
    run = started(12, validate_every=4)
    kind = f"SIGTERM to one rank, {place}"
    table.tried(kind)
    running = disturb(run, rank, place, signal.SIGTERM)
    assert running.wait() == [SAVED, SAVED], running.output()
    assert finish(run) == 0
    same(run, alone(12))
    table.survived(kind)


def tell(running, drawn):
    running.send(signal.SIGTERM, drawn.choice([0, 1]))


def lost_by_stopping(run, codes, output):
    """Nothing; a rank that does not heed signals yet just ends."""
    assert codes == [SAVED, SAVED] or -signal.SIGTERM in codes, output
    assert last_step(run) == max(good_steps(run), default=0)
    return 0


@pytest.mark.faults
def test_sigterm_to_one_rank_at_random_moments(alone, tmp_path, table):
    kind = "SIGTERM to one rank at a random moment"
    at_random_moments(tmp_path, table, kind, 20, 2, alone(STEPS), tell, lost_by_stopping)


@pytest.mark.parametrize(("rank", "place"), cases(HELD))
def test_sigstop_of_one_rank(started, alone, table, rank, place):
    """The other one ends by its watchdog, and whoever started them kills the one that cannot end."""
    run = started(12, validate_every=4, hang_timeout=4.0)
    kind = f"SIGSTOP of one rank, {place}"
    table.tried(kind)
    running = disturb(run, rank, place, signal.SIGSTOP)
    running.processes[1 - rank].join(60)
    running.send(signal.SIGKILL, rank)
    codes = running.wait()
    assert (codes[rank], codes[1 - rank]) == (KILLED, HUNG), running.output()
    assert "its process is stopped or lost" in running.output()
    lost = finish(run)
    same(run, alone(12))
    table.survived(kind, lost)


@pytest.mark.parametrize(("rank", "place"), cases(HELD, (1, "in a step")))
def test_a_rank_that_is_stopped_and_goes_on(started, alone, table, rank, place):
    run = started(12, validate_every=4)
    kind = "SIGSTOP of one rank, SIGCONT in time"
    table.tried(kind)
    running, deadline = disturb(run, rank, place, signal.SIGSTOP), time.monotonic() + 60
    process = psutil.Process(running.processes[rank].pid)
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    assert running.wait() == [0, 0], running.output()
    same(run, alone(12))
    table.survived(kind)


@pytest.mark.faults
def test_sigterm_after_the_last_step_changes_nothing(started, alone, table):
    run = started(8)
    kind = "SIGTERM to one rank, writing the weights"
    table.tried(kind)
    codes, output = attempt(disturbed, 2, run, 1, "trainer.training:Training", "_write_weights", 1, signal.SIGTERM)
    assert codes == [0, 0], output
    same(run, alone(8))
    table.survived(kind)
