"""Two nodes, a hostfile and the `deepspeed` command alone: what a user types who has no use for `stretto run`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import run_command
from ranks import run_ranks
from small_runs import CLIP, SMALL, melody
from tokenising import contents
from training_runs import TINY, checkpoint, job, make_run, rows, weights_digest

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


@pytest.fixture
def by_hand(cluster, tmp_path):
    """Runs a module on both nodes, which have nothing of this process's environment that must cross by itself."""
    hostfile = cluster.hostfile(tmp_path / "hosts")

    def launch(module: str, run: Path, stage: str) -> str:
        command = [DEEPSPEED, f"--hostfile={hostfile}", "--module", module, "--run", str(run), "--stage", stage]
        done = cluster.run("alpha", command, {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {node: cluster.left(node) for node in cluster.nodes} == {"alpha": {}, "beta": {}}
        return done.stdout + done.stderr

    return launch


def test_a_stage_trains_on_two_nodes_as_on_one(by_hand, tmp_path):
    run, alone = (make_run(tmp_path / name, **TINY) for name in ("run", "alone"))
    said = by_hand("trainer", run, "coarse")
    assert said.count("through network interface eth0") == 1
    run_ranks(job, 2, tmp_path / "log", alone)
    assert [row["loss"] for row in rows(run, "train")] == pytest.approx([row["loss"] for row in rows(alone, "train")])
    assert weights_digest(run) == weights_digest(alone)
    assert checkpoint(run, TINY["steps"]).is_dir()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of few clips, up to its tokens."""
    import soundfile

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "music").mkdir()
    for number in range(4):
        soundfile.write(folder / "music" / f"{number}.wav", melody(6.5, 16_000, number), 16_000)
    stages = ("corpus", "codec", "embedding", "quantizers", "tokens")
    only = [word for name in stages for word in ("--only", name)]
    command = ["run", "quickstart", "-o", str(folder / "run"), f"data.audio={folder / 'music'}", *CLIP, *SMALL, *only]
    made = run_command(["launcher", *command], timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "run"


def test_tokens_made_on_two_nodes_are_those_of_one(by_hand, prepared, tmp_path):
    run = shutil.copytree(prepared, tmp_path / "run")
    shutil.rmtree(run / "tokens")
    by_hand("launcher.worker", run, "tokens")
    assert contents(run / "tokens") == contents(prepared / "tokens")
