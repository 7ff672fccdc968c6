"""A launcher that is killed or interrupted: what it has started goes on, or ends, and is never made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_runs import FAKE, alive, build, finish, of_run, start, tell, wait_for
from helpers import ROOT

from data.lock import holder
from launcher.stopping import stop
from model.errors import UserError


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("stage", ["b", "c"])
def test_what_a_killed_launcher_left_running_is_taken_over(run, stage):
    told, child = tell(run, stage, "wait"), run.with_name("child")
    process = start(run)
    wait_for(lambda: child.exists() and child.read_text())
    process.kill()
    process.communicate()
    again = start(run, "--only=b")  # what runs is watched all the same
    wait_for(lambda: holder(run) and holder(run).pid == again.pid)
    told.unlink()
    code, output = finish(again)
    assert code == 0
    assert f"{stage}: started before, and taken over" in output
    assert "a: started" not in output
    assert (run / "logs" / f"{stage}.log").read_text().count("localhost: ") == 1


def test_what_ended_without_a_launcher_is_not_made_again(run):
    told, child = tell(run, "b", "wait"), run.with_name("child")
    process = start(run)
    wait_for(lambda: child.exists() and child.read_text())
    process.kill()
    process.communicate()
    told.unlink()
    wait_for(lambda: not of_run(run))
    code, output = build(run)
    assert code == 0
    assert "b: started" not in output
    assert "d: done" in output


def test_what_still_runs_by_another_recipe_is_named(run):
    tell(run, "b", "wait")
    child, process = run.with_name("child"), start(run)
    wait_for(lambda: child.exists() and child.read_text())
    process.kill()
    process.communicate()
    code, output = build(run, "seed=5")
    assert code == 2
    assert f"b still runs, as an earlier command with another recipe asked for: `stretto stop {run}` ends it" in output
    said = []
    stop(run, say=said.append)
    assert "stopped. The same command goes on" in said[-1]
    assert not of_run(run)


def test_nothing_outlives_its_supervisor(run):
    tell(run, "b", "sleep")
    child, process = run.with_name("child"), start(run)
    wait_for(lambda: child.exists() and child.read_text())
    supervisor = int(json.loads((run / "state.json").read_text())["stages"]["b"]["job"].split(":")[2])
    process.kill()
    process.communicate()
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not alive(int(child.read_text())) and not of_run(run))


def test_what_a_dead_run_left_running_is_ended(run):
    """Even when the supervisor and the guard were killed together with the launcher."""
    told, child = tell(run, "b", "sleep"), run.with_name("child")
    process = start(run)
    wait_for(lambda: child.exists() and child.read_text())
    supervisor = int(json.loads((run / "state.json").read_text())["stages"]["b"]["job"].split(":")[2])
    (guard,) = psutil.Process(supervisor).children()
    os.kill(supervisor, signal.SIGSTOP)
    for pid in (process.pid, guard.pid, supervisor):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not alive(int(child.read_text())) and not of_run(run))
    told.unlink()
    assert build(run)[0] == 0


def test_an_interrupt_ends_everything_and_says_how_to_go_on(run):
    told, child = tell(run, "c", "sleep"), run.with_name("child")
    process = start(run)
    wait_for(lambda: child.exists() and child.read_text())
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130
    assert "the same command continues" in output
    assert not alive(int(child.read_text()))
    assert not of_run(run)
    assert json.loads((run / "state.json").read_text())["stages"]["c"]["state"] == "interrupted"
    told.unlink()
    assert build(run)[0] == 0


def test_nohup_keeps_it_going_when_the_terminal_closes(run):
    told, child = tell(run, "b", "wait"), run.with_name("child")
    command = ["nohup", sys.executable, str(FAKE), str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: child.exists() and child.read_text())
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    told.unlink()
    code, output = finish(process)
    assert code == 0, output


@pytest.mark.parametrize("now", [False, True])
def test_it_can_be_stopped_from_elsewhere(run, now):
    tell(run, "c", "sleep")
    process, child = start(run), run.with_name("child")
    wait_for(lambda: child.exists() and child.read_text())
    said = []
    stop(run, now, said.append)
    assert f"process {process.pid} is told to {'end' if now else 'save and end'}." in said[0]
    assert "stopped. The same command goes on" in said[-1]
    assert not of_run(run)
    assert finish(process)[0] == 130
    assert json.loads((run / "state.json").read_text())["stages"]["c"]["state"] == "interrupted"
    stop(run, say=said.append)
    assert "nothing is running" in said[-1]


def test_what_a_launcher_that_is_told_to_stop_had_not_taken_over_is_stopped_too(run):
    tell(run, "c", "sleep")
    child, process = run.with_name("child"), start(run)
    wait_for(lambda: child.exists() and child.read_text())
    process.kill()
    process.communicate()
    # A later one that still looks at the hosts.
    checks = "import sys, time; from pathlib import Path; from data.lock import locked\n"
    checks += "with locked(Path(sys.argv[1])): time.sleep(60)"
    later = subprocess.Popen([sys.executable, "-c", checks, str(run)], cwd=ROOT)
    wait_for(lambda: holder(run) and holder(run).pid == later.pid)
    said = []
    stop(run, say=said.append)
    assert later.wait(1) == -signal.SIGTERM
    assert len(said) == 3
    assert f"process {later.pid} is told to save and end." in said[0]
    assert "stopped. The same command goes on" in said[-1]
    assert not of_run(run)


def test_what_runs_on_another_machine_is_not_stopped_here(run):
    assert build(run)[0] == 0
    (run / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "since": time.time()}))
    with pytest.raises(UserError, match=f"another machine: stop it there, with `kill {os.getpid()}` on elsewhere"):
        stop(run)


def test_a_second_run_in_the_same_folder_is_told_who_is_there(run):
    tell(run, "b", "sleep")
    process = start(run)
    wait_for(run.with_name("child").exists)
    code, output = build(run)
    assert code == 2
    assert f"is in use by process {process.pid} since" in output
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130


def test_what_may_run_under_another_machines_eyes_is_not_made_here(run):
    assert build(run)[0] == 0
    state, job = json.loads((run / "state.json").read_text()), "b:elsewhere:7:boot-1"
    state["stages"]["b"] |= {"state": "running", "job": job}
    (run / "state.json").write_text(json.dumps(state))
    (run / "jobs" / "b.json").write_text(json.dumps({"job": job}))
    code, output = build(run)
    assert code == 2
    assert "b was started on elsewhere, where it may still run: give the command there" in output
    (run / "jobs" / "b.json").unlink()
    assert build(run)[0] == 0
