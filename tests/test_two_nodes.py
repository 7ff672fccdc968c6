"""A whole run on two real nodes: one is cut off while it trains and comes back, the launcher is killed meanwhile, and
the run is interrupted twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from small_runs import SMALL

from data.lock import holder
from launcher.run_folder import read_state
from model import artifact

pytestmark = pytest.mark.timeout(900)
PATIENCE = 240
SLOW = [
    "stages.semantic.model.transformer.dim=256",
    "stages.semantic.model.transformer.layers=4",
    "stages.semantic.model.transformer.heads=4",
    "stages.semantic.train.global_batch=8",
    "stages.semantic.train.steps=200",
    "stages.semantic.train.checkpoint_every=5",
    "stages.semantic.train.validate_every=100",
    "stages.semantic.train.log_every=1",
    "evaluation.prompts=2",
    "stages.coarse.train.ranks=1",
    "stages.fine.train.ranks=1",
]
"""Keys that let the semantic stage train for a while on both nodes, and the other two afterwards side by side."""


def entry(run, stage):
    return read_state(run)["stages"].get(stage, {})


def steps(run):
    """Steps of the semantic stage that have been trained, newest last."""
    lines = (run / "semantic" / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for line in lines if (row := json.loads(line)).get("kind", "train") == "train"]


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def checkpoints(run):
    return {path.name for path in (run / "semantic" / "checkpoints").glob("step-*")}


def interrupt(cluster, process, times=1):
    """Presses Ctrl-C, and waits until the run and all it has started are gone."""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert process.wait(PATIENCE) == 130
    assert {node: cluster.left(node) for node in cluster.nodes} == {"alpha": {}, "beta": {}}


def test_a_run_goes_on_without_a_lost_node_and_grows_when_it_is_back(cluster, tmp_path):
    run, hostfile = tmp_path / "run", cluster.hostfile(tmp_path / "hosts", slots=1)
    options = ["-o", str(run), "--hostfile", str(hostfile), "data.clips=48"]
    command = [sys.executable, "-m", "launcher", "run", "quickstart", *options, *SMALL, *SLOW]

    printed = tmp_path / "printed"

    def start():
        with printed.open("w") as output:
            return cluster.popen("alpha", command, stdout=output, stderr=subprocess.STDOUT)

    # Ctrl-C twice does not wait for anything to be saved.
    process = start()
    wait_for(lambda: entry(run, "quantizers").get("job") and len(cluster.processes("beta")) > 1, process)
    interrupt(cluster, process, times=2)

    process = start()
    wait_for(lambda: len(checkpoints(run)) > 1, process)
    assert entry(run, "semantic")["hosts"] == "alpha:0 beta:0"
    cluster.cut("beta")
    wait_for(lambda: entry(run, "semantic").get("hosts") == "alpha:0", process)
    before = checkpoints(run)
    wait_for(lambda: checkpoints(run) - before, process)
    assert not cluster.left("beta")  # what ran there has ended by itself

    # What goes on without the lost node is taken over without it.
    assert "beta can no longer be reached; it is left out until it can" in printed.read_text()
    assert "semantic: beta can no longer be reached; it goes on from step" in printed.read_text()
    cluster.run("alpha", ["kill", "-KILL", str(holder(run).pid)])
    process.wait(PATIENCE)
    process = start()
    wait_for(lambda: "beta cannot be reached; it is left out until it can" in printed.read_text(), process)
    cluster.restore("beta")
    wait_for(lambda: entry(run, "semantic").get("hosts") == "alpha:0 beta:0", process)
    before = checkpoints(run)
    wait_for(lambda: checkpoints(run) - before, process)

    # Ctrl-C once saves.
    interrupt(cluster, process)
    output = printed.read_text()
    assert "semantic: started before, and taken over" in output
    assert "beta is back" in output
    assert "semantic: is saving, to go on with more than 1 ranks" in output
    assert entry(run, "semantic")["state"] == "interrupted"
    saved = max(int(name.removeprefix("step-")) for name in checkpoints(run))
    assert saved == steps(run)[-1]

    process = start()
    assert process.wait(2 * PATIENCE) == 0, printed.read_text()
    assert {node: cluster.left(node) for node in cluster.nodes} == {"alpha": {}, "beta": {}}
    assert artifact.problems(artifact.read(run / "bundle")) == []
    assert steps(run)[-1] == 200
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    trained = [(one["hosts"], one["lost"], one["code"] == 0) for one in history if one["stage"] == "semantic"]
    both = "alpha:0 beta:0"
    assert trained == [(both, ["beta"], False), ("alpha:0", [], False), (both, [], False), (both, [], True)]
    # The two that need half of it each train at the same time.
    stages = {name: entry(run, name) for name in ("coarse", "fine")}
    assert {one["hosts"] for one in stages.values()} == {"alpha:0", "beta:0"}
    assert stages["fine"]["started"] < stages["coarse"]["finished"]
