"""`stretto stop` of a training that was started by hand, and of a submission to a cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from fake_runs import wait_for
from helpers import ROOT, free_port
from training_runs import TINY, checkpoints, make_run, rows

from launcher.recipe import dump_recipe, load_recipe
from launcher.restarts import Ended
from launcher.stopping import stop
from trainer.checkpoint_folder import steps_in
from trainer.exit_codes import SAVED

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


SUBMITTER = """
import os, subprocess, sys, time
from pathlib import Path
from data.lock import locked
if len(sys.argv) == 2:
    with locked(Path(sys.argv[1])):
        subprocess.run([sys.executable, *sys.orig_argv[1:], str(os.getpid())])
while os.getppid() == int(sys.argv[2]):
    time.sleep(0.05)
time.sleep(0.5)
(Path(sys.argv[1]) / "listed").write_text("7")
"""
"""Submits a job, which the cluster knows only some time after this was ended."""


class Cluster:
    """Has the jobs 6, which was noted, and 7 once it is listed."""

    def __init__(self, run):
        self.run, self.cancelled = run, []

    def listed(self):
        listed = self.run / "listed"
        return {"codec": listed.read_text()} if listed.exists() else {}

    def poll(self, handle):
        return Ended(SAVED) if handle in self.cancelled else None

    def cancel(self, handle, now=False):
        self.cancelled.append(handle)


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """The cluster of a run of which one job was submitted, and the next is to be."""
    cluster = Cluster(tmp_path / "run")
    for module in ("launcher.stopping", "launcher.backends.others"):
        monkeypatch.setattr(f"{module}.batch_backend", lambda *_: cluster)
    cluster.run.mkdir()
    (cluster.run / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    waiting = {"state": "waiting", "backend": "slurm", "job": None}
    stages = {"corpus": {**waiting, "job": "6"}, "codec": waiting}
    (cluster.run / "state.json").write_text(json.dumps({"format_version": 1, "stages": stages}))
    return cluster


def test_what_is_about_to_be_submitted_is_stopped_too(submitted):
    submitter = subprocess.Popen([sys.executable, "-c", SUBMITTER, str(submitted.run)], cwd=ROOT)
    said = []
    try:
        wait_for(psutil.Process(submitter.pid).children)
        stop(submitted.run, say=said.append)
        assert submitter.wait(1) == -signal.SIGTERM
    finally:
        submitter.kill()
    assert submitted.cancelled == ["7", "6"]
    assert "corpus (job 6), codec (job 7)" in said[1]
    assert "stopped" in said[2]


def test_what_was_submitted_from_another_machine_is_stopped(submitted):
    other = {"host": f"not-{socket.gethostname()}", "pid": 12, "since": time.time()}
    (submitted.run / ".lock").write_text(json.dumps(other))
    said = []
    stop(submitted.run, say=said.append)
    assert submitted.cancelled == ["6"]
    assert f"process 12 on {other['host']} may submit more: end it there if it still lives." in said[1]
    assert "stopped" in said[2]
