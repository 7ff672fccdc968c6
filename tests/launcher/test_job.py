"""The supervisor of a job, with processes in the place of the guards on its hosts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from fake_runs import wait_for

from launcher import job
from launcher.backends import Job, direct
from launcher.graph import stage_named
from launcher.guard import END, SAVE
from launcher.job import UNREACHABLE, Node, supervise
from launcher.job_record import alive, handle_of, read_job
from launcher.placement import Part
from launcher.recipe import load_recipe
from trainer.exit_codes import HUNG, SAVED

GUARD = """
import sys, time
codes = {b"s": int(sys.argv[1]), b"e": int(sys.argv[2])}
if len(sys.argv) > 3:
    time.sleep(0.3)
    sys.exit(int(sys.argv[3]))
while byte := sys.stdin.buffer.raw.read(1):
    if byte in codes:
        sys.exit(codes[byte])
"""
"""Ends with a code when it is told to save, or to end, or by itself."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(job, "LEASE", 0.5)
    monkeypatch.setattr(job, "PING_SECONDS", 0.1)
    monkeypatch.setattr(job, "END_SECONDS", 1.0)


def node(host, *codes, remote=True):
    command = [sys.executable, "-c", GUARD, *map(str, codes)]
    return Node(host, remote, subprocess.Popen(command, stdin=subprocess.PIPE))


def test_without_a_lost_host_the_others_are_ended_and_only_it_is_called_lost():
    nodes = [node("alpha", SAVED, UNREACHABLE), node("beta", SAVED, UNREACHABLE, UNREACHABLE)]
    started = time.monotonic()
    assert supervise(nodes, []) == UNREACHABLE
    assert [one.host for one in nodes if one.lost] == ["beta"]
    assert time.monotonic() - started > 0.5  # what runs on beta may still be there for so long


def test_the_code_is_that_of_the_host_that_failed_first_and_the_others_get_time_to_end():
    nodes = [node("alpha", SAVED, UNREACHABLE), node("beta", SAVED, UNREACHABLE, HUNG)]
    assert supervise(nodes, []) == HUNG
    assert not [one.host for one in nodes if one.lost]
    assert nodes[0].told_to_end


@pytest.mark.parametrize(("told", "code"), [(SAVE, SAVED), (END, UNREACHABLE)])
def test_what_it_is_told_is_passed_on(told, code):
    nodes = [node("alpha", SAVED, UNREACHABLE), node("beta", SAVED, UNREACHABLE)]
    number = {SAVE: job.signal.SIGTERM, END: job.signal.SIGQUIT}[told]
    signals: list[int] = []
    threading.Timer(0.5, signals.append, (number,)).start()
    assert supervise(nodes, signals) == code
    assert not [one.host for one in nodes if one.lost]


def test_nothing_runs_by_a_launcher_that_was_killed_before_it_could_note_it(tmp_path):
    """The next one would not know of it, and start the stage once more."""
    script = f"""
import os
from pathlib import Path
from launcher.backends import Job
from launcher.backends.direct import Direct
from launcher.graph import stage_named
from launcher.placement import Part
from launcher.recipe import load_recipe
run = Path({str(tmp_path)!r})
job = Job(run, load_recipe("quickstart"), stage_named("corpus"), (Part("localhost", (0,), 1),))
Direct(run).submit(job, lambda handle: (print(handle, flush=True), os._exit(9)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 9, done.stderr
    wait_for(lambda: not alive(done.stdout.strip()))
    assert "error:" not in (tmp_path / "logs" / "corpus.log").read_text()  # the stage would have said so
    assert not (tmp_path / "jobs").exists()


def test_a_supervisor_is_known_again_when_the_clock_is_set():
    handle, now = handle_of("tokens", os.getpid()), psutil.boot_time()
    assert alive(handle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil._pslinux.boot_time", lambda: now + 3600)
        assert alive(handle)
    name, ticks = handle.rsplit("-", 1)
    assert not alive(f"{name}-{int(ticks) - 1}")


def test_a_job_that_was_just_started_is_known_to_be_there(tmp_path, monkeypatch):
    """On another machine that is all there is to see of it before its supervisor has said anything."""
    monkeypatch.setattr(
        direct.subprocess, "Popen", lambda *_, **__: SimpleNamespace(pid=os.getpid(), stdin=io.BytesIO())
    )
    handle = direct.Direct(tmp_path).submit(
        Job(tmp_path, load_recipe("quickstart"), stage_named("corpus"), (Part("localhost", (0,), 1),))
    )
    assert read_job(tmp_path, "corpus") == {"job": handle}


@contextlib.contextmanager
def guarding(lease):
    """A guard, and the process that it has started."""
    task = {"command": ["sleep", "100"], "folder": "/", "environment": {}, "sharers": 1, "lease": lease}
    command = [sys.executable, "-m", "launcher.guard"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as guard:
        guard.stdin.write(json.dumps(task) + "\n")
        guard.stdin.flush()
        yield guard, command_of(guard)


def test_a_guard_whose_supervisor_is_silent_ends_all_it_has_started():
    """As on a host that is cut off, whose ssh connection does not close."""
    with guarding(lease=1.0) as (guard, child):
        for _ in range(8):  # longer than the lease
            guard.stdin.write(".")
            guard.stdin.flush()
            time.sleep(0.2)
        assert guard.poll() is None
        assert guard.wait(30) == -9
        assert ended(child)


def test_a_guard_that_is_killed_leaves_nothing_running():
    """As by a kernel that is out of memory."""
    with guarding(lease=None) as (guard, child):
        guard.kill()
        guard.wait(30)
        wait_for(lambda: ended(child))


def command_of(guard):
    """The process that a guard has started."""
    found = []

    def started():
        found[:] = [child for child in psutil.Process(guard.pid).children() if child.name() == "sleep"]
        return found

    wait_for(started)
    return found[0]


def ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
