from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import FAKE, build, tell

from data.lock import locked
from launcher.outcome import gist, user_message
from launcher.processes import Machine, ranks
from launcher.recipe import load_recipe
from launcher.run_folder import RunFolder, read_state
from launcher.runner import space_needed
from launcher.stages import STAGES
from model.errors import UserError
from trainer.config import TrainConfig


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
