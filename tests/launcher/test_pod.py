"""Pods of a stage's job: two as two process groups of this machine, with the environment that a cluster gives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, free_port, run_command
from training_runs import TINY, change, checkpoints, log_of, make_run, rows

from launcher.job_record import read_job
from trainer.exit_codes import SAVED

PATIENCE = 120
OWN_MEMORY = ("unshare", "--mount", "--ipc", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
"""Pods share their folder and not their memory, by which loaders of one node know each other."""


@pytest.fixture
def run(tmp_path):
    """A run folder as a launcher leaves it that has given its coarse stage to a cluster."""
    run = make_run(tmp_path / "run", **TINY)
    made_from = {"name": "coarse", "version": 2, "keys": {}, "inputs": {}, "taken_over": "0123456789abcdef"}
    state = {"format_version": 1, "recipe": "test", "stages": {"coarse": {"state": "waiting", "made_from": made_from}}}
    (run / "state.json").write_text(json.dumps(state))
    return run


def pod(run, node, port, job="job-1"):
    """The process that a container of the pod would start, in a process group of its own."""
    address = {"JOB_COMPLETION_INDEX": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["--run", str(run), "--stage", "coarse", "--job", job, "--nodes", "2", "--ranks-per-node", "1"]
    return subprocess.Popen(
        [*OWN_MEMORY, sys.executable, "-m", "launcher.pod", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **address},
        start_new_session=True,
    )


@pytest.fixture
def pods(run):
    """Starts both pods; none outlives its test."""
    if subprocess.run([*OWN_MEMORY, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    started = []

    def start():
        port = free_port()
        started.extend(pod(run, node, port) for node in (0, 1))
        return started[-2:]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(processes):
    """Exit codes and outputs of pods."""
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def wait_for_step(run, processes):
    deadline = time.monotonic() + PATIENCE
    while not any(checkpoints(run).glob("step-*")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def test_two_pods_train_a_stage_that_is_told_to_stop_and_goes_on(run, pods):
    change(run, steps=5000)
    both = pods()
    wait_for_step(run, both)
    assert read_job(run, "coarse")["state"] == "running"
    both[1].terminate()  # as when its node is drained
    codes, outputs = ended(both)
    assert codes == [SAVED, SAVED], outputs
    said = read_job(run, "coarse")
    assert (said["state"], said["job"], said["restarts"]) == ("interrupted", "job-1", 0)
    assert said["hosts"] == "node-0:0 node-1:0"

    step = max(int(path.name.removeprefix("step-")) for path in checkpoints(run).glob("step-*"))
    change(run, steps=step + 4)
    codes, outputs = ended(pods())
    assert codes == [0, 0], outputs
    said = read_job(run, "coarse")
    assert (said["state"], said["restarts"], said["error"]) == ("done", 1, None)
    assert said["seconds"] > said["finished"] - said["started"]
    assert [row["step"] for row in rows(run, "train")][-1] == step + 4
    assert f"step {step}" in log_of(run)
    assert "node 0 of 2" in (run / "logs" / "coarse.log").read_text()
    assert "node 1 of 2" in (run / "logs" / "coarse-node-1.log").read_text()

    before = (run / "coarse" / "manifest.json").stat().st_mtime_ns
    codes, outputs = ended(pods())  # a pod that was evicted when all was done is started again
    assert codes == [0, 0]
    assert outputs[0] == "coarse is made already.\n"
    assert (run / "coarse" / "manifest.json").stat().st_mtime_ns == before


def test_a_mistake_of_the_user_is_said_and_has_its_exit_code(run, pods):
    (run / "tokens" / "manifest.json").unlink()
    codes, outputs = ended(pods())
    assert codes == [2, 2], outputs
    said = read_job(run, "coarse")
    assert said["state"] == "failed"
    assert str(run / "tokens") in said["error"]
    assert f"coarse failed: {said['error'].splitlines()[0]}" in outputs[0]
    assert "Traceback" not in outputs[0]


def test_a_stage_that_nobody_asked_for_is_refused(run):
    done = run_command(["launcher.pod", "--run", str(run), "--stage", "fine", "--job", "job-1"])
    assert done.returncode == 2
    assert "nothing asked for stage 'fine'" in done.stderr


def test_a_rank_that_is_killed_is_a_failure_of_its_pod(run, pods):
    change(run, steps=5000)
    both = pods()
    wait_for_step(run, both)
    (rank,) = [int(pid) for pid in children(both[0].pid)]
    os.kill(rank, signal.SIGKILL)
    codes, outputs = ended(both)
    assert codes[0] == 128 + signal.SIGKILL, outputs
    assert codes[1] == 1, outputs
    assert "out of memory" in read_job(run, "coarse")["error"]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()
