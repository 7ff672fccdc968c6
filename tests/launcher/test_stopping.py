"""`stretto stop` of a training that was started by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fake_runs import wait_for
from helpers import free_port
from training_runs import TINY, checkpoints, make_run, rows

from launcher.stopping import stop
from trainer.checkpoint_folder import steps_in

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("now", [False, True])
def test_a_training_by_hand_saves_unless_it_is_to_end_now(tmp_path, now):
    run = make_run(tmp_path / "run", **{**TINY, "steps": 100_000, "checkpoint_every": 50_000})
    command = [sys.executable, "-m", "trainer", "--run", str(run), "--stage", "coarse"]
    environment = {**os.environ, **ALONE, "MASTER_PORT": str(free_port())}
    training = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = run / "coarse" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and rows(run, "train"))
        said: list[str] = []
        stop(run, now, said.append)
        assert f"process {training.pid} is told to {'end' if now else 'save and end'}." in said[0]
        training.wait(30)
    finally:
        training.kill()
        training.wait()
    assert steps_in(checkpoints(run)) == ([] if now else [rows(run, "train")[-1]["step"]])
