"""A whole run on two real nodes, one of which is cut off while it trains and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from nodes import nodes, skip_reason
from small_runs import SMALL

from launcher.placement import in_words, parse_share
from model import artifact

pytestmark = [pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())), pytest.mark.timeout(900)]
PATIENCE = 240
SLOW = [
    "stages.semantic.model.transformer.dim=256",
    "stages.semantic.model.transformer.layers=4",
    "stages.semantic.model.transformer.heads=4",
    "stages.semantic.train.global_batch=8",
    "stages.semantic.train.steps=300",
    "stages.semantic.train.checkpoint_every=10",
    "stages.semantic.train.validate_every=100",
    "stages.coarse.train.ranks=1",
    "stages.fine.train.ranks=1",
]
"""Keys that let the semantic stage train for a while on both nodes, and the other two afterwards side by side."""


def entry(run, stage):
    return json.loads((run / "state.json").read_text())["stages"].get(stage, {})


def steps(run):
    """Steps of the semantic stage that have been trained, newest last."""
    lines = (run / "semantic" / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for line in lines if (row := json.loads(line)).get("kind", "train") == "train"]


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def checkpoints(run):
    return {path.name for path in (run / "semantic" / "checkpoints").glob("step-*")}


def test_a_run_goes_on_without_a_lost_node_and_grows_when_it_is_back(tmp_path):
    run = tmp_path / "run"
    with nodes(tmp_path / "nodes", "alpha", "beta") as cluster:
        hostfile = cluster.hostfile(tmp_path / "hosts", slots=1)
        options = ["-o", str(run), "--hostfile", str(hostfile), "data.clips=48"]
        command = [sys.executable, "-m", "launcher", "run", "quickstart", *options, *SMALL, *SLOW]
        process = cluster.popen("alpha", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(lambda: len(checkpoints(run)) > 1, process)
        assert entry(run, "semantic")["hosts"] == "alpha:0 beta:0"
        cluster.cut("beta")
        wait_for(lambda: entry(run, "semantic").get("hosts") == "alpha:0", process)
        before = checkpoints(run)
        wait_for(lambda: checkpoints(run) - before, process)
        assert not cluster.left("beta")  # what ran there has ended by itself
        cluster.restore("beta")
        wait_for(lambda: entry(run, "semantic").get("hosts") == "alpha:0 beta:0", process)
        output = process.communicate(timeout=2 * PATIENCE)[0]
        assert process.returncode == 0, output
        assert not cluster.left("alpha")
        assert not cluster.left("beta")
    assert "beta can no longer be reached; it is left out until it can" in output
    assert "semantic: beta can no longer be reached; it goes on from step" in output
    assert "beta is back" in output
    assert "semantic: is saving, to go on with more than 1 ranks" in output
    assert artifact.problems(artifact.read(run / "bundle")) == []
    assert steps(run)[-1] == 300
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    trained = [(one["hosts"], one["lost"], one["code"] == 0) for one in history if one["stage"] == "semantic"]
    both = in_words(parse_share("alpha:0 beta:0", []))
    assert trained == [(both, ["beta"], False), ("alpha:0", [], False), (both, [], True)]
    # The two that need half of it each train at the same time.
    stages = {name: entry(run, name) for name in ("coarse", "fine")}
    assert {one["hosts"] for one in stages.values()} == {"alpha:0", "beta:0"}
    assert stages["fine"]["started"] < stages["coarse"]["finished"]
