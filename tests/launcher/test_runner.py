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

from data.lock import holder, locked
from launcher.outcome import gist, user_message
from launcher.processes import Machine, ranks
from launcher.recipe import load_recipe
from launcher.run_folder import RunFolder, read_state
from launcher.runner import space_needed
from launcher.stages import STAGES
from launcher.stopping import stop
from model.errors import UserError
from trainer.config import TrainConfig

FAKE = Path(__file__).with_name("fake_run.py")
PATIENCE = 30
"""Seconds until something that must happen has failed to."""


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FAKE), str(run), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, output


def build(run: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of one run of the fake stages."""
    return finish(start(run, *arguments))


def tell(run: Path, stage: str, behaviour: str) -> Path:
    told = run.with_name(f"{run.name}-{stage}")
    told.write_text(behaviour)
    return told


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def of_run(run: Path) -> list[int]:
    """The processes that work for `run`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(run) in (process.info["cmdline"] or []) and alive(process.pid):
            found.append(process.pid)
    return found


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def test_everything_is_built_in_order_once(run):
    code, output = build(run, "parallel=2")
    assert code == 0
    order = [line.split(":")[0] for line in output.splitlines() if ": done in" in line]
    assert order[0] == "a"
    assert sorted(order[1:3]) == ["b", "c"]
    assert order[3] == "d"
    assert "reported" in output

    code, output = build(run)
    assert code == 0
    assert "everything is up to date" in output
    assert "started" not in output
    record = json.loads((run / "state.json").read_text())["stages"]
    assert all(entry["state"] == "done" and entry["reused"] for entry in record.values())

    code, output = build(run, "seed=5")
    assert code == 0
    assert [line for line in output.splitlines() if line.endswith(": started")] == ["b: started", "d: started"]
    assert "b: outdated (seed: 0 → 5); moved to" in output
    assert (run / "previous" / "b" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("user error", 2, "b failed: the value is wrong\nand this is how to put it right\n"),
        ("fault", 1, "b failed: ValueError: something broke\nIts log is"),
        ("disk full", 2, "is full: make room, then run the same command again"),
        ("killed", 1, "b failed: it was killed, most often because the machine ran out of memory"),
    ],
)
def test_a_stage_that_fails_says_why_and_leaves_nothing_half_made(run, behaviour, code, words):
    tell(run, "b", behaviour)
    found, output = build(run, "restarts.limit=0")
    assert found == code
    assert words in output
    assert not (run / "b").exists()
    assert (run / "a" / "manifest.json").exists()
    assert json.loads((run / "state.json").read_text())["stages"]["b"]["state"] == "failed"


@pytest.mark.parametrize(
    ("behaviour", "code", "state", "words"),
    [
        ("diverged", 2, "failed", "c failed: it diverged\nafter step 7\n"),
        ("hung", 1, "failed", "c failed: it hung\nafter step 7\nIts log is"),
        ("was told to stop", 1, "failed", "the same command goes on from step 1"),
    ],
)
def test_what_a_trained_stage_ends_with_is_told_apart(run, behaviour, code, state, words):
    told = tell(run, "c", behaviour)
    found, output = build(run, "restarts.limit=0")
    assert found == code
    assert words in output
    assert ("the same command goes on from step 1" in output) == (behaviour != "diverged")
    assert json.loads((run / "state.json").read_text())["stages"]["c"]["state"] == state
    assert "d: started" not in output
    told.unlink()
    assert build(run)[0] == 0
    assert "resumed" in (run / "logs" / "c.log").read_text()


def test_a_stage_that_no_run_has_begun_can_be_started_by_hand(run):
    assert build(run, "--only=a")[0] == 0
    for stage in ("c", "b"):
        subprocess.run([sys.executable, str(FAKE), "stage", str(run), stage], check=True)
    code, output = build(run)
    assert code == 0
    assert [line for line in output.splitlines() if line.endswith(": started")] == ["d: started"]


@pytest.mark.parametrize(("state", "seed"), [("failed", "seed=0"), ("running", "seed=5")])
def test_what_a_clusters_job_has_said_is_forgotten_when_it_is_over(run, state, seed, monkeypatch):
    """Of a job that failed, whose stage was then made by hand; and of one that was killed without a word, whose stage
    is made anew here."""
    assert build(run)[0] == 0
    told = json.loads((run / "state.json").read_text())
    told["stages"]["b"] |= {"backend": "slurm", "job": "7", "state": state, "error": "of long ago"}
    (run / "state.json").write_text(json.dumps(told))
    (run / "jobs" / "b.json").write_text(json.dumps({"job": "7", "state": state, "error": "of long ago"}))
    # As Slurm answers when it knows nothing of a job any more.
    squeue = run.with_name("bin") / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\nexit 0\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    code, output = build(run, seed)
    assert code == 0, output
    entry = read_state(run)["stages"]["b"]
    assert (entry["state"], entry["error"]) == ("done", None)


def test_a_stage_that_another_job_works_in_is_not_moved_away(run):
    assert build(run)[0] == 0
    with locked(run / "b"):
        code, output = build(run, "seed=5")
    assert code == 2
    assert f"b failed: {run / 'b'} is in use by process {os.getpid()} since" in output
    assert not (run / "previous").exists()
    assert build(run, "seed=5")[0] == 0
    assert (run / "previous" / "b" / "manifest.json").exists()


def test_a_stage_whose_port_was_taken_gets_another(run):
    told = tell(run, "c", "busy port once")
    code, output = build(run, "restarts.limit=0")
    assert code == 0
    assert "c: its port was taken; trying another" in output
    # So it does when it is started again for another reason, and not for ever.
    told.write_text("hung, busy port")
    code, output = build(run, "evaluation.prompts=3", "restarts.pause=0.1", "restarts.limit=2")
    assert code == 1
    assert output.count("c: it hung") == 1
    assert output.count("c: its port was taken; trying another") == 2


@pytest.mark.parametrize(
    ("stage", "behaviour", "words"),
    [
        ("b", "killed", "b: it was killed, most often because the machine ran out of memory; it starts it again in"),
        ("c", "was told to stop", "c: it was told to stop by another, and saved; it goes on from step 1 in"),
        ("c", "hung", "c: it hung\nafter step 7; it goes on from step 1 in"),
        ("c", "fault", "c: ValueError: something broke; it goes on from step 1 in"),
    ],
)
def test_what_is_worth_another_try_gets_one(run, stage, behaviour, words):
    tell(run, stage, f"{behaviour} once")
    code, output = build(run, "restarts.pause=0.1")
    assert code == 0, output
    assert words in output
    entry = json.loads((run / "state.json").read_text())["stages"][stage]
    assert (entry["state"], entry["restarts"], entry["error"]) == ("done", 1, None)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(one["attempt"], one["code"] == 0) for one in history if one["stage"] == stage] == [(1, False), (2, True)]


def test_tries_without_a_new_checkpoint_come_to_an_end(run):
    tell(run, "c", "hung")
    code, output = build(run, "restarts.pause=0.1", "restarts.limit=2")
    assert code == 1
    assert output.count("c: it hung\nafter step 7; it goes on") == 2
    assert "c failed: it hung" in output
    # A fault of the program would come again as well.
    tell(run, "c", "fault")
    code, output = build(run, "restarts.pause=0.1")
    assert code == 1
    assert "it goes on from step 1 in" not in output


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
    guard = json.loads((run / "jobs" / "b.json").read_text())["guards"][0][0]
    os.kill(supervisor, signal.SIGSTOP)
    for pid in (process.pid, guard, supervisor):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert alive(int(child.read_text()))
    told.unlink()
    assert build(run)[0] == 0
    assert not alive(int(child.read_text()))


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
    assert f"process {process.pid} is told to save and end" in said[0]
    assert "stopped. The same command goes on" in said[-1]
    assert not of_run(run)
    assert finish(process)[0] == 130
    assert json.loads((run / "state.json").read_text())["stages"]["c"]["state"] == "interrupted"
    stop(run, say=said.append)
    assert "nothing is running" in said[-1]


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


def test_another_recipes_folder_is_refused(run):
    assert build(run, "--only=a")[0] == 0
    code, output = build(run, "name=other")
    assert code == 2
    assert "was made by recipe 'quickstart', not 'other'" in output


def test_a_mistake_leaves_the_recipe_of_a_run_as_it_was(run):
    assert build(run, "--only=a")[0] == 0
    before = (run / "recipe.yaml").read_text()
    code, output = build(run, "seed=9", "--only=d")
    assert code == 2
    assert "stage 'd' needs b, c" in output
    assert (run / "recipe.yaml").read_text() == before


def test_a_newer_formats_folder_is_refused(run):
    recipe = load_recipe("quickstart")
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(UserError, match="newer Stretto"), RunFolder.opened(run, recipe):
        pass


def test_a_folder_of_something_else_is_refused(run):
    run.mkdir()
    (run / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="not a run folder"), RunFolder.opened(run, load_recipe("quickstart")):
        pass
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]


def test_leftovers_of_a_dead_run_are_cleared_and_what_was_being_replaced_comes_back(run):
    checkpoints = run / "semantic" / "checkpoints"
    recipe = load_recipe("quickstart")
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
    for name in (
        ".corpus.partial",
        "semantic/checkpoints/.step-00000002.partial",
        ".codec.old",
        "codec",
        ".tokens.old",
    ):
        (run / name).mkdir(parents=True)
    with RunFolder.opened(run, recipe):
        assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["codec", "semantic", "tokens"]
        assert not list(checkpoints.iterdir())


def test_a_disk_without_room_is_named_before_anything_starts(run):
    recipe = load_recipe("musiclm_large")
    assert space_needed(recipe, STAGES) > 1e10
    with RunFolder.opened(run, recipe) as folder, pytest.raises(UserError, match="this run needs about"):
        folder.check_space(10**18)


def test_the_machine_is_shared_out():
    machine = Machine(cores=8, gpus=("0", "1", "2", "3"))
    assert [machine.share(slot, 3).gpus for slot in range(3)] == [("0", "3"), ("1",), ("2",)]
    assert [Machine(2, ("5",)).share(slot, 2).gpus for slot in range(2)] == [("5",), ("5",)]
    assert Machine(2, ()).share(0, 3) == Machine(1, ())


def test_with_fewer_gpus_than_ranks_the_batch_is_still_divided():
    config = TrainConfig(ranks=4, global_batch=32)
    assert [ranks(config, gpus) for gpus in (0, 8, 3, 1)] == [4, 4, 2, 1]


def test_the_reason_of_a_failure_is_found_in_its_log():
    log = "Traceback (most recent call last):\n[rank1]: KeyError: 'x'\n[rank0]: RuntimeError: peer is gone\nbye\n"
    assert gist(log, 1, first=True) == "KeyError: 'x'"
    assert gist(log, 1, first=False) == "RuntimeError: peer is gone"
    assert gist("last words\n", 3, first=False) == "exit code 3: last words"
    assert "out of memory" in gist("", 247, first=True)
    assert user_message("error: one\n       two\nrest") == "one\ntwo"
    assert user_message("nothing of the kind") is None
