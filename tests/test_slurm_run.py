"""Whole runs on a real Slurm of two nodes: as dependent jobs, cancelled, out of time, and gone on with."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import soundfile
from helpers import ROOT
from ranks import run_ranks
from slurm_cluster import missing, slurm_cluster
from small_runs import CLIP, SMALL

from launcher.run_folder import read_state
from launcher.status import ORDER
from model import artifact
from trainer.__main__ import train

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(600)]

ONE_RANK = [f"stages.{stage}.train.ranks=1" for stage in ("semantic", "fine")]
RECIPE = ["data.clips=60", *CLIP, *SMALL, *ONE_RANK, "slurm.nodes=2", "slurm.time=30m"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TRAINED = ("semantic", "coarse", "fine")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def stretto(cluster, *arguments, code=0, timeout=120):
    """What a command prints that is given on the login node."""
    done = cluster.run(sys.executable, "-m", "launcher", *arguments, code=code, env=ENVIRONMENT, timeout=timeout)
    return done.stdout + done.stderr


def submit(cluster, run, *more, code=0):
    return stretto(cluster, "run", "quickstart", "-o", run, "--slurm", *RECIPE, *more, code=code)


def jobs(cluster):
    """What squeue says of every job that it knows: {name: state}, of the newest of a name."""
    listed = cluster.run("squeue", "--noheader", "--states=all", "--sort=i", "--format=%j %T").stdout
    return dict(line.split() for line in listed.splitlines())


def entry(run, stage):
    return read_state(run)["stages"].get(stage, {})


def attempts(run, stage):
    """Those that the run remembers."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def wait_until(cluster, condition, timeout=240):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{jobs(cluster)}\n{cluster.logs()}"
        time.sleep(0.5)


def ended(run, stage):
    return entry(run, stage).get("state") in ("done", "failed", "interrupted")


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """A run of which one training was cancelled by scancel and one was told to stop, and that was then gone on with."""
    run = tmp_path_factory.mktemp("run") / "a run of 100%"
    printed = submit(cluster, run)
    for name in entry(run, "bundle")["made_from"]["inputs"]:
        assert entry(run, name)["job"] in printed
    assert {"quickstart-corpus", "quickstart-semantic", "quickstart-bundle"} <= jobs(cluster).keys()
    assert entry(run, "coarse")["job"] in printed
    wait_until(cluster, lambda: all(entry(run, stage)["state"] == "running" for stage in TRAINED))
    first = {stage: entry(run, stage)["job"] for stage in TRAINED}
    cluster.run("scancel", first["coarse"])
    wait_until(cluster, lambda: ended(run, "coarse"))
    wait_until(cluster, lambda: jobs(cluster)["quickstart-bundle"] == "CANCELLED")
    again = submit(cluster, run)
    second = {stage: entry(run, stage)["job"] for stage in TRAINED}
    wait_until(cluster, lambda: jobs(cluster)["quickstart-samples"] not in ("PENDING", "RUNNING", "COMPLETING"))
    return run, first, second, again


def test_a_recipe_becomes_dependent_jobs_and_a_bundle(cluster, finished):
    run, *_ = finished
    assert artifact.problems(artifact.read(run / "bundle", "bundle")) == []
    assert json.loads((run / "report.json").read_text())["corpus"]["clips"] == 60
    stages = read_state(run)["stages"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    assert stages["coarse"]["hosts"] == "alpha:0 beta:0"
    assert stages["tokens"]["hosts"] == "alpha:0 beta:0"
    assert json.loads(stretto(cluster, "status", run, "--json"))["state"] == "done"


def test_a_cancelled_stage_is_submitted_again_and_what_lives_is_left_alone(finished):
    _, first, second, again = finished
    assert second["coarse"] != first["coarse"]
    assert (second["semantic"], second["fine"]) == (first["semantic"], first["fine"])
    assert "corpus" not in again


def test_both_jobs_of_a_cancelled_stage_are_counted(finished):
    run, *_ = finished
    past = attempts(run, "coarse")
    assert [one["code"] == 0 for one in past] == [False, True]
    assert entry(run, "coarse")["seconds"] == pytest.approx(sum(one["seconds"] for one in past), abs=0.1)
    assert {one["stage"] for one in map(json.loads, (run / "history.jsonl").read_text().splitlines())} == set(ORDER)


def test_what_is_up_to_date_is_not_submitted(cluster, finished):
    run, *_ = finished
    before = len(jobs(cluster))
    submit(cluster, run)
    assert len(jobs(cluster)) == before


def test_a_mistake_of_the_users_ends_what_depends_on_it(cluster, tmp_path):
    (tmp_path / "music").mkdir()
    soundfile.write(tmp_path / "music" / "silent.wav", np.zeros(160_000), 16_000)
    printed = submit(cluster, tmp_path / "run", f"data.audio={tmp_path / 'music'}", "--wait", code=2)
    found = entry(tmp_path / "run", "corpus")
    assert found["state"] == "failed"
    assert "silent" in found["error"]
    assert found["error"].splitlines()[0] in printed
    assert jobs(cluster)["quickstart-samples"] == "CANCELLED"


def coarse_again(run, folder):
    """A copy of a finished run that has never trained its coarse stage."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("coarse", "coarse.*", "history.jsonl"))
    state = read_state(folder)
    state["stages"].pop("coarse", None)
    (folder / "state.json").write_text(json.dumps(state))


def uninterrupted(run, folder):
    """The digest of the coarse weights when the same is trained without Slurm."""
    coarse_again(run, folder)
    (folder / "coarse").mkdir()
    shutil.copy(run / "coarse" / "stage.json", folder / "coarse")
    run_ranks(train, 2, folder.parent / "ranks", folder, "coarse", timeout=240)
    return artifact.file_digest(folder / "coarse" / "model.safetensors")


def saved(run):
    return list((run / "coarse" / "checkpoints").glob("step-*"))


def ranks_of(run):
    """The processes that train."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:3] == ["-m", "launcher.slurm_rank"] and str(run) in words:
                yield process


def train_coarse(cluster, finished, run, *more, steps=400, checkpoint_every=20):
    """Submits the coarse stage of a copy of a finished run, which is to train anew; what the command prints."""
    if not run.exists():
        coarse_again(finished[0], run)
    train = {"steps": steps, "checkpoint_every": checkpoint_every, "validate_every": 1000}
    keys = [f"stages.coarse.train.{key}={value}" for key, value in train.items()]
    return submit(cluster, run, "--only", "coarse", *keys, *more)


def restarts_until_done(cluster, run):
    """Waits for the coarse stage to be done; checks that all its attempts are remembered, and returns how often it was
    started again."""
    wait_until(cluster, lambda: ended(run, "coarse"))
    found, past = entry(run, "coarse"), attempts(run, "coarse")
    assert found["state"] == "done", log_of(run)
    assert [one["attempt"] for one in past] == list(range(1, found["restarts"] + 2))
    assert [one["code"] == 0 for one in past] == [False] * found["restarts"] + [True]
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in past), abs=0.1)
    return found["restarts"]


def log_of(run):
    return (run / "logs" / "coarse.log").read_text()


def test_a_time_limit_saves_and_the_job_goes_on_exactly(cluster, finished, tmp_path):
    """The ranks are held until the signal has come, so that the training does not end before. It comes when Slurm next
    looks at time limits, which it does twice a minute."""
    run = tmp_path / "run"
    train_coarse(cluster, finished, run, "slurm.signal_seconds=50", steps=100, checkpoint_every=5)
    job = entry(run, "coarse")["job"]
    wait_until(cluster, lambda: saved(run))
    for process in ranks_of(run):
        process.suspend()
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+60")
    with ThreadPoolExecutor() as meanwhile:
        expected = meanwhile.submit(uninterrupted, run, tmp_path / "alone")
        wait_until(cluster, lambda: "its time is nearly up" in log_of(run))
        for process in ranks_of(run):
            process.resume()
        wait_until(cluster, lambda: entry(run, "coarse")["state"] == "waiting")
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        assert restarts_until_done(cluster, run) == 1, log_of(run)
    assert entry(run, "coarse")["job"] == job
    assert "resumed at step" in log_of(run)
    assert artifact.file_digest(run / "coarse" / "model.safetensors") == expected.result()


@pytest.mark.faults
def test_a_job_is_preempted_and_goes_on_exactly(cluster, finished, tmp_path):
    """A more urgent job takes both nodes; ranks get some seconds."""
    run = tmp_path / "run"
    train_coarse(cluster, finished, run)
    wait_until(cluster, lambda: saved(run))
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "true")
    assert restarts_until_done(cluster, run) == 1, log_of(run)
    expected = uninterrupted(run, tmp_path / "alone")
    assert artifact.file_digest(run / "coarse" / "model.safetensors") == expected


@pytest.mark.faults
def test_a_stage_that_is_stopped_saves_and_is_not_put_back(cluster, finished, tmp_path):
    run = tmp_path / "run"
    train_coarse(cluster, finished, run, steps=2000, checkpoint_every=1000)
    metrics = run / "coarse" / "metrics.jsonl"
    wait_until(cluster, lambda: metrics.exists() and '"train"' in metrics.read_text())
    stretto(cluster, "stop", run)
    wait_until(cluster, lambda: ended(run, "coarse"))
    assert entry(run, "coarse")["state"] == "interrupted"
    wait_until(cluster, lambda: jobs(cluster)["quickstart-coarse"] == "FAILED")
    assert len(saved(run)) == 1
    assert "Traceback" not in (run / "logs" / "coarse.log").read_text()


@pytest.mark.faults
def test_a_rank_that_is_killed_is_started_again(cluster, finished, tmp_path):
    run = tmp_path / "run"
    train_coarse(cluster, finished, run)
    wait_until(cluster, lambda: saved(run))
    list(ranks_of(run))[-1].kill()
    assert restarts_until_done(cluster, run) == 1, log_of(run)
    assert "coarse: it was killed" in log_of(run)


@pytest.mark.faults
@pytest.mark.parametrize("node", ["alpha", "beta"])
def test_a_node_is_lost_and_the_job_goes_on_when_it_is_back(cluster, finished, tmp_path, node):
    """Alpha takes with it what would say how the attempt has ended."""
    run = tmp_path / "run"
    train_coarse(cluster, finished, run)
    wait_until(cluster, lambda: saved(run))
    cluster.lose(node)
    wait_until(cluster, lambda: jobs(cluster)["quickstart-coarse"] == "PENDING")
    status = json.loads(stretto(cluster, "status", run, "--json"))
    assert next(stage["state"] for stage in status["stages"] if stage["name"] == "coarse") == "waiting"
    assert train_coarse(cluster, finished, run).count("which lives") == 1
    cluster.bring_back(node)
    # Twice where a signal to the lost attempt reaches the next: the pause against that is short in this cluster.
    assert restarts_until_done(cluster, run) in (1, 2), log_of(run)
    assert "resumed at step" in log_of(run)
