"""`stretto stop`: what works in a run folder saves and ends, as if it had been interrupted where it runs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from data.lock import Holder, holder
from launcher.backends import Backend
from launcher.backends.others import batch_backend, job_of, over
from launcher.job_record import supervisor
from launcher.recipe import read_run_recipe
from launcher.run_folder import DIRECT, may_run, read_state
from launcher.status import TRAINED, read_status
from model.errors import UserError

POLL_SECONDS = 0.2
LONGEST = 120
"""Seconds to wait for the end: a launcher gives its stages 60 to save."""
SUBMISSION = 15
"""Seconds to wait for a submission that was under way."""


def stop(run: Path, now: bool = False, say: Callable[[str], None] = print) -> None:
    """Tells what works in `run` to save and end, and waits until it has: the `stretto run` there, the jobs that it or
    an earlier one has submitted or left running; or trainings that were started by hand. With `now` stages are ended
    without saving.

    Raises UserError where `run` is not a run folder, or what works there does so on another machine or does not end.
    """
    read_status(run)
    deadline, told = time.monotonic() + LONGEST, False
    while _end_next(run, now, say, deadline, told):
        told = True
    say(f"{run}: stopped. The same command goes on from here." if told else f"{run}: nothing is running.")


def _end_next(run: Path, now: bool, say: Callable[[str], None], deadline: float, told: bool) -> bool:
    """Ends what is to end next; False where nothing is left. A launcher comes first: what it has submitted meanwhile,
    or was about to take over from an earlier one, can be seen when it has ended."""
    launcher = holder(run)
    here = launcher is not None and launcher.host == socket.gethostname()
    if not here and (submitted := _submitted(run)):
        _cancel(run, submitted, now, say, deadline)
        if launcher:  # it may be dead: of another machine that cannot be seen
            say(f"{run}: process {launcher.pid} on {launcher.host} may submit more: end it there if it still lives.")
    elif launcher and (here or not told):
        started = _children(launcher)
        _end(run, [launcher], [signal.SIGTERM] * (2 if now else 1), say, deadline)
        given_up = time.monotonic() + SUBMISSION
        while any(child.alive() for child in started) and time.monotonic() < given_up:
            time.sleep(POLL_SECONDS)
    elif left := _left_running(run):
        _end(run, left, [signal.SIGQUIT if now else signal.SIGTERM], say, deadline)
    elif trainings := [found for stage in TRAINED if not told and (found := holder(run / stage))]:
        # Without their first rank the others end as well.
        _end(run, trainings, [signal.SIGKILL if now else signal.SIGTERM], say, deadline)
    else:
        return False
    return True


def _end(
    run: Path, told: list[Holder], signals: list[signal.Signals], say: Callable[[str], None], deadline: float
) -> None:
    """Sends `signals` to processes, and waits for their end."""
    elsewhere = [f"`kill {found.pid}` on {found.host}" for found in told if found.host != socket.gethostname()]
    if elsewhere:
        raise UserError(f"{run} is worked in on another machine: stop it there, with {' and '.join(elsewhere)}.")
    what = _what(now=signals != [signal.SIGTERM])
    say(f"{run}: process {' and '.join(str(found.pid) for found in told)} is told to {what}.")
    for number, sent in enumerate(signals):
        if number:
            time.sleep(1)  # two signals at once may be taken for one
        _signal(told, sent)
    while any(found.alive() for found in told):
        if time.monotonic() > deadline:
            raise UserError(f"{run}: it has not ended after {LONGEST} s. `stretto stop --now` does not let it save.")
        time.sleep(POLL_SECONDS)


def _children(launcher: Holder) -> list[Holder]:
    """What it has started, such as a submission: the job of one that is under way can only be seen when it is over."""
    try:
        children = psutil.Process(launcher.pid).children()
    except psutil.Error:
        return []
    return [Holder(launcher.host, child.pid, time.time()) for child in children]


def _what(now: bool) -> str:
    return "end" if now else "save and end"


def _submitted(run: Path) -> dict[str, tuple[Backend, str]]:
    """The jobs of a cluster that wait or run, by their stages: backend and handle."""
    found: dict[str, tuple[Backend, str]] = {}
    for name, entry in read_state(run)["stages"].items():
        if (entry.get("backend") or DIRECT) == DIRECT or over(entry):
            continue
        recipe = read_run_recipe(run)
        backend, handle = batch_backend(entry["backend"], run, recipe), job_of(name, entry, run, recipe)
        if handle is not None and backend.poll(handle) is None:
            found[name] = backend, handle
    return found


def _cancel(
    run: Path, submitted: dict[str, tuple[Backend, str]], now: bool, say: Callable[[str], None], deadline: float
) -> None:
    """Tells jobs of a cluster to end, those that need others first: else they might start meanwhile."""
    say(f"{run}: told to {_what(now)}: {', '.join(f'{name} (job {job})' for name, (_, job) in submitted.items())}.")
    for backend, handle in reversed(submitted.values()):
        backend.cancel(handle, now)
    while any(backend.poll(handle) is None for backend, handle in submitted.values()):
        if time.monotonic() > deadline:
            raise UserError(
                f"{run}: its jobs have not ended after {LONGEST} s. `stretto stop --now` does not let them save."
            )
        time.sleep(1)


def _left_running(run: Path) -> list[Holder]:
    """The supervisors of jobs that a launcher which is gone has started."""
    found = []
    for name, entry in read_state(run)["stages"].items():
        if entry.get("job") and (entry.get("backend") or DIRECT) == DIRECT and may_run(run, name, entry):
            found.append(supervisor(entry["job"]))
    return found


def _signal(told: list[Holder], number: signal.Signals) -> None:
    for found in told:
        try:
            os.kill(found.pid, number)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise UserError(f"process {found.pid} is another user's: ask them to stop it.") from None
