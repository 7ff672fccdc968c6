"""A corpus tokenised into a bucket and trained on from there, by the commands a user types."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from buckets import BUCKET, keys
from helpers import ROOT, run_command
from small_runs import CLIP, SMALL, caption_everything, music_folder

from data.shard_cache import least_cache
from data.token_corpus import TokenCorpus
from launcher.job_record import supervisor
from launcher.run_folder import read_state
from model.artifact import file_digest
from trainer.metrics_reader import last_metrics

PREPARED = ("corpus", "codec", "embedding", "quantizers", "tokens")
STEPS = 60


def stretto(*arguments: object, code: int = 0) -> str:
    result = run_command(["launcher", *map(str, arguments)], timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The recipe's overrides, and a run with tokens on the disk on which a coarse stage was trained undisturbed."""
    folder = tmp_path_factory.mktemp("storage")
    audio = caption_everything(music_folder(folder / "music"))
    train = {"steps": STEPS, "checkpoint_every": 5, "ranks": 1, "shuffle_block": 4}
    own = [f"stages.coarse.train.{key}={value}" for key, value in train.items()]
    overrides = [f"data.audio={audio}", *CLIP, *SMALL, *own]
    only = [word for name in (*PREPARED, "coarse") for word in ("--only", name)]
    stretto("run", "quickstart", "-o", folder / "run", *overrides, *only)
    return overrides, folder / "run"


def begun(run):
    """A run with all that comes before the tokens."""
    shutil.copytree(run, (new := run.with_name("remote")), ignore=shutil.ignore_patterns("tokens", "coarse", ".*"))
    state = json.loads((new / "state.json").read_text())
    for name in ("tokens", "coarse"):
        del state["stages"][name]
    (new / "state.json").write_text(json.dumps(state))
    return new


def kill_amid(command, run):
    """SIGKILL for all of a training that has saved."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *map(str, command)], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list((run / "coarse").glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it saved nothing"
        time.sleep(0.05)
    job = read_state(run)["stages"]["coarse"]["job"]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.kill(supervisor(job).pid, signal.SIGKILL)  # all it has started ends with it


def test_tokens_in_a_bucket_train_the_same_model_through_a_small_cache(prepared, s3):
    overrides, local = prepared
    run, place = begun(local), f"s3://{BUCKET}/some/tokens"
    remote = [*overrides, f"tokens.upload={place}", "data.ranks=2"]
    command = ["run", "quickstart", "-o", run, *remote, "--only"]
    stretto(*command, "tokens")
    there = [key.removeprefix("some/tokens/") for key in keys(f"s3://{BUCKET}")]
    shards = [name for name in there if name.endswith(".mds")]
    assert {"manifest.json", "train/index.json", "train/columns.json", "validation/index.json"} < set(there)
    assert not list((run / "tokens").rglob("*.mds"))
    assert {path.relative_to(local / "tokens").as_posix() for path in (local / "tokens").rglob("*.mds")} == set(shards)
    assert "whole" in stretto("inspect", run / "tokens")

    corpus = TokenCorpus.read(run / "tokens")
    sizes = {
        split: sum(entry["raw_data"]["bytes"] for entry in corpus.index(split)) for split in ("train", "validation")
    }
    limit = least_cache([corpus], "train", 0) + sizes["validation"]
    assert limit < sum(sizes.values())
    limited = [*command, "coarse", f"stages.coarse.train.cache_limit={limit}"]
    kill_amid(limited, run)
    assert last_metrics(run / "coarse" / "metrics.jsonl", "train")["step"] < STEPS
    stretto(*limited)
    assert "resumed at step" in (run / "coarse" / "logs" / "rank-0000.log").read_text()
    assert file_digest(run / "coarse" / "model.safetensors") == file_digest(local / "coarse" / "model.safetensors")
    kept = list((run / "cache").rglob("*.mds"))
    assert sum(path.stat().st_size for path in kept) <= limit


def test_a_place_that_holds_other_tokens_is_left_alone(prepared, s3):
    overrides, local = prepared
    s3.put_object(Bucket=BUCKET, Key="taken/manifest.json", Body=b'{"fingerprint": "0123"}')
    run = begun(local) if not local.with_name("remote").exists() else local.with_name("remote")
    command = ["run", "quickstart", "-o", run, *overrides, "--only", "tokens"]
    said = stretto(*command, f"tokens.upload=s3://{BUCKET}/taken", code=2)
    assert "holds something else already (fingerprint 0123): name another place" in " ".join(said.split())
    assert "no-such" in stretto(*command, "tokens.upload=s3://no-such-bucket/tokens", code=2)
    assert keys(f"s3://{BUCKET}") == ["taken/manifest.json"]
