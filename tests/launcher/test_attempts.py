"""Attempts of a job that its cluster starts as often as it takes: counted, added up, remembered."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from launcher.attempts import Attempts
from launcher.backends import Job
from launcher.batch import submit_all
from launcher.graph import StageState, origins, stage_named
from launcher.recipe import load_recipe
from launcher.run_folder import HISTORY, RunFolder, read_state


@pytest.fixture
def run(tmp_path):
    """A run folder whose coarse stage an earlier job has worked on for 100 s, and been started again once."""
    entry = {"state": "waiting", "backend": "slurm", "job": "8", "seconds": 100.0, "restarts": 1}
    (tmp_path / "state.json").write_text(json.dumps({"format_version": 1, "stages": {"coarse": entry}}))
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the test moves on."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def attempt(run, clock, number, code=None, seconds=10.0):
    """One that ends with `code`, or without a word."""
    attempts = Attempts(run, "coarse", "8")
    attempts.begin("alpha:0", number)
    clock[0] += seconds
    if code is not None:
        attempts.end(code)


def entry(run):
    return read_state(run)["stages"]["coarse"]


def history(run):
    lines = [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]
    return [(line["stage"], line["attempt"], line["hosts"], line["seconds"], line["code"]) for line in lines]


def test_attempts_of_all_jobs_are_added_up(run, clock):
    attempt(run, clock, 1, code=75)
    assert (entry(run)["restarts"], entry(run)["seconds"]) == (1, 110.0)
    clock[0] += 500  # waiting is no work
    attempt(run, clock, 2, code=0, seconds=20.0)
    assert (entry(run)["restarts"], entry(run)["seconds"], entry(run)["finished"]) == (2, 130.0, clock[0])
    assert history(run) == [("coarse", 1, "alpha:0", 10.0, 75), ("coarse", 2, "alpha:0", 20.0, 0)]


def test_an_attempt_that_ended_without_a_word_counts_until_its_last_sign(run, clock):
    attempt(run, clock, 1, seconds=30.0)
    (run / "progress").mkdir()
    (run / "progress" / "coarse.json").write_text(json.dumps({"time": clock[0] - 5}))
    clock[0] += 500
    attempt(run, clock, 3, code=0)  # the second was lost before it could say that it began
    assert (entry(run)["restarts"], entry(run)["seconds"]) == (3, 135.0)
    assert history(run) == [("coarse", 1, "alpha:0", 25.0, None), ("coarse", 3, "alpha:0", 10.0, 0)]


def test_what_does_not_count_is_counted_here(run, clock):
    attempt(run, clock, None, code=1)
    attempt(run, clock, None, code=0)
    assert entry(run)["restarts"] == 2


def test_a_job_that_died_unsaid_counts_where_another_is_submitted(run, clock):
    attempt(run, clock, 1, seconds=30.0)
    (run / "progress").mkdir()
    (run / "progress" / "coarse.json").write_text(json.dumps({"time": clock[0] - 5}))
    recipe, folder, coarse = load_recipe("quickstart"), RunFolder(run), stage_named("coarse")
    folder.state = read_state(run)
    backend = SimpleNamespace(name="slurm", submit_all=lambda jobs, submitted: submitted("coarse", "9"))
    states = {"coarse": StageState("coarse", "missing")}
    submit_all(folder, origins(recipe), states, [Job(run, recipe, coarse, ())], backend, {}, Console(quiet=True))
    assert (entry(run)["job"], entry(run)["state"], entry(run)["seconds"]) == ("9", "waiting", 125.0)
    assert history(run) == [("coarse", 1, "alpha:0", 25.0, None)]
    Attempts(run, "coarse", "9").begin("beta:0", 1)
    assert (entry(run)["restarts"], entry(run)["seconds"], len(history(run))) == (1, 125.0, 1)
