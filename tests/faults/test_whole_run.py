"""A whole run that is killed in every stage, or loses its tokens: the same command finishes it, and nothing is ever
half there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from faults.matrix import damage_file
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


def entry_of(run, stage):
    try:
        return json.loads((run / "state.json").read_text())["stages"].get(stage, {})
    except FileNotFoundError:
        return {}


def kill_in(run, stage, supervisor=True):
    """Starts the run, kills its launcher soon after `stage` has started, with the supervisor of the stage's job unless
    that is to go on alone, and checks what is left."""
    process = start(run)
    deadline = time.monotonic() + TIMEOUT
    while not (entry := entry_of(run, stage)).get("job") or entry["state"] != "running":
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stage} never started"
        time.sleep(0.01)
    time.sleep(6 if stage in ("semantic", "coarse", "fine") else 0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not supervisor:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(entry["job"].split(":")[2]), signal.SIGKILL)
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


@pytest.mark.faults
def test_killed_in_every_stage(tmp_path, table):
    run, kind = tmp_path / "run", "SIGKILL of the launcher and the supervisor in a stage of a whole run"
    for stage in STAGES:
        table.tried(kind)
        kill_in(run, stage)
        table.survived(kind)
    finish(run)


@pytest.mark.faults
def test_taken_over_in_every_stage(tmp_path, table):
    """What ran when its launcher was killed is not started again."""
    run, kind = tmp_path / "run", "SIGKILL of the launcher alone in a stage of a whole run"
    for stage in STAGES:
        table.tried(kind)
        kill_in(run, stage, supervisor=False)
        table.survived(kind)
    finish(run)
    for stage in STAGES:
        assert (run / "logs" / f"{stage}.log").read_text().count(f" localhost: {sys.prefix}") == 1


@pytest.mark.faults
@pytest.mark.parametrize("how", ["deleted", "truncated", "one byte flipped"])
def test_damaged_tokens_are_made_anew(tmp_path, table, how):
    """What is missing or of another size the launcher sees by itself; a flipped byte the training names, and what it
    says helps. What was trained before stays."""
    run, kind = tmp_path / "run", f"token shard of a whole run: {how}"
    kill_in(run, "coarse")
    shard = run / "tokens" / "train" / "shard.00000.mds"
    good, trained = shard.read_bytes(), (run / "semantic" / artifact.MANIFEST).exists()
    damage_file(shard, how)
    table.tried(kind)
    if how == "one byte flipped":
        process = start(run)
        output = " ".join(process.communicate(timeout=TIMEOUT)[0].split())
        assert process.returncode == 2, output
        assert f"{shard} has changed" in output
        assert f"Move {run / 'tokens'} away and run the same command again" in output
        (run / "tokens").rename(tmp_path / "away")
    finish(run)
    assert shard.read_bytes() == good
    assert trained == ("semantic" in reused(run))
    table.survived(kind)


def reused(run):
    stages = json.loads((run / "state.json").read_text())["stages"]
    return {name for name, entry in stages.items() if entry.get("reused")}
