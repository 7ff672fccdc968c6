"""SIGKILL in every stage of a real run: the same command finishes it, and nothing is ever half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT
from small_runs import SMALL

from model import artifact

STAGES = ["corpus", "codec", "embedding", "quantizers", "tokens", "semantic", "coarse", "fine", "bundle", "samples"]
TIMEOUT = 180


def start(run):
    command = [sys.executable, "-m", "launcher", "run", "quickstart", "-o", str(run), "data.clips=48", *SMALL]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(run):
    """What still runs for this run folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(run) in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def state(run, stage):
    try:
        return json.loads((run / "state.json").read_text())["stages"][stage]["state"]
    except (FileNotFoundError, KeyError):
        return None


def kill_in(run, stage):
    """Starts the run, kills its launcher soon after `stage` has started, and checks what is left."""
    process = start(run)
    deadline = time.monotonic() + TIMEOUT
    while state(run, stage) != "running":
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stage} never started"
        time.sleep(0.01)
    time.sleep(6 if stage in ("semantic", "coarse", "fine") else 0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while processes_of(run):
        assert time.monotonic() < deadline, processes_of(run)
        time.sleep(0.1)
    check_whole(run)


def check_whole(run):
    """Every artifact that has its name is all there."""
    for name in STAGES:
        if (run / name / artifact.MANIFEST).exists():
            assert artifact.problems(artifact.read(run / name)) == []
        elif name not in ("semantic", "coarse", "fine"):
            assert not (run / name).exists()


def finish(run):
    process = start(run)
    try:
        output = process.communicate(timeout=3 * TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the run hung") from None
    assert process.returncode == 0, output
    check_whole(run)
    assert {path.parent.name for path in run.glob("*/manifest.json")} == set(STAGES)
    assert (run / "report.html").exists()


def test_killed_in_a_data_stage_and_in_a_trained_one(tmp_path):
    for stage in ("embedding", "coarse"):
        kill_in(tmp_path / "run", stage)
    finish(tmp_path / "run")


@pytest.mark.faults
def test_killed_in_every_stage(tmp_path):
    for stage in STAGES:
        kill_in(tmp_path / "run", stage)
    finish(tmp_path / "run")
