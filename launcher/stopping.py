"""`stretto stop`: what works in a run folder saves and ends, as if it had been interrupted where it runs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

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


def stop(run: Path, now: bool = False, say: Callable[[str], None] = print) -> None:
    """Tells what works in `run` to save and end, and waits until it has: the `stretto run` there; or, where that is
    gone, the jobs it has left running; or trainings that were started by hand. With `now` stages are ended without
    saving.

    Raises UserError where `run` is not a run folder, or what works there does so on another machine or does not end.
    """
    read_status(run)
    submitted = _submitted(run)
    if submitted:
        _cancel(run, submitted, now, say)
        return
    launcher, left = holder(run), _left_running(run)
    trainings = [found for stage in TRAINED if (found := holder(run / stage))]
    told = [launcher] if launcher else left or trainings  # a launcher tells its jobs, and these their ranks
    if not told:
        say(f"{run}: nothing is running.")
        return
    elsewhere = [f"`kill {found.pid}` on {found.host}" for found in told if found.host != socket.gethostname()]
    if elsewhere:
        raise UserError(f"{run} is worked in on another machine: stop it there, with {' and '.join(elsewhere)}.")
    say(f"{run}: process {' and '.join(str(found.pid) for found in told)} is told to {_what(now)}.")
    if launcher or not now:
        _signal(told, signal.SIGTERM)
    else:  # without their first rank the others of a training by hand end as well
        _signal(told, signal.SIGQUIT if left else signal.SIGKILL)
    if now and launcher:
        time.sleep(1)  # two signals at once may be taken for one
        _signal(told, signal.SIGTERM)
    deadline = time.monotonic() + LONGEST
    while any(found.alive() for found in told):
        if time.monotonic() > deadline:
            raise UserError(f"{run}: it has not ended after {LONGEST} s. `stretto stop --now` does not let it save.")
        time.sleep(POLL_SECONDS)
    say(f"{run}: stopped. The same command goes on from here.")


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


def _cancel(run: Path, submitted: dict[str, tuple[Backend, str]], now: bool, say: Callable[[str], None]) -> None:
    """Tells jobs of a cluster to end, those that need others first: else they might start meanwhile."""
    say(f"{run}: told to {_what(now)}: {', '.join(f'{name} (job {job})' for name, (_, job) in submitted.items())}.")
    for backend, handle in reversed(submitted.values()):
        backend.cancel(handle, now)
    deadline = time.monotonic() + LONGEST
    while any(backend.poll(handle) is None for backend, handle in submitted.values()):
        if time.monotonic() > deadline:
            raise UserError(
                f"{run}: its jobs have not ended after {LONGEST} s. `stretto stop --now` does not let them save."
            )
        time.sleep(1)
    say(f"{run}: stopped. The same command goes on from here.")


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
