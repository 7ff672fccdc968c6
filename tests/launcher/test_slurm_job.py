"""What the batch step of a stage's job says of its end, where Slurm's commands only act the part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.backends.slurm import Slurm
from launcher.graph import stage_named
from launcher.recipe import dump_recipe, load_recipe
from launcher.restarts import Ended
from launcher.run_folder import read_state
from launcher.slurm_job import Attempt

RECIPE = load_recipe("quickstart")
SCONTROL = 'case "$1" in requeue) echo "Access denied" >&2; exit 1;; *) echo alpha;; esac'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose coarse stage is job 7, which Slurm holds to have failed, and does not put back."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    (run / "logs").mkdir(parents=True)
    programs.mkdir()
    made_from = {"name": "coarse", "version": 2, "keys": {}, "inputs": {}, "taken_over": "0123456789abcdef"}
    entry = {"state": "waiting", "backend": "slurm", "job": "7", "made_from": made_from}
    (run / "state.json").write_text(json.dumps({"format_version": 1, "stages": {"coarse": entry}}))
    (run / "recipe.yaml").write_text(dump_recipe(RECIPE))
    act(programs / "squeue", "echo 7 FAILED")
    act(programs / "scontrol", SCONTROL)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "alpha", "TASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return run


def act(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("ranks", "code", "said"),
    [
        ("exit 0", 1, "without its artifact"),
        ("echo 'OSError: No space left on device' >> logs/coarse.log; exit 1", 2, "full"),
        ("exit 75", 1, "does not start it again"),
    ],
)
def test_a_stage_that_failed_counts_as_failed_whatever_its_ranks_ended_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, code: int, said: str
) -> None:
    act(tmp_path / "bin" / "srun", ranks)
    monkeypatch.chdir(run)
    told = SimpleNamespace(anything=False, to_end=False, srun=None)
    assert Attempt(run, stage_named("coarse"), told).go() == code
    entry = read_state(run)["stages"]["coarse"]
    assert entry["state"] == "failed"
    assert said in entry["error"]
    assert Slurm(run, RECIPE.slurm).poll("7") == Ended(code)
