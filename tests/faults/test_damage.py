"""Files that are deleted, cut off or changed: an older checkpoint is gone on from, token shards are named."""

from __future__ import annotations

import itertools
import time

import pytest
from faults.matrix import FILES, all_say, attempt, damage_file, finish, last_step, resumptions, same
from training_runs import checkpoints, job

from trainer.checkpoint_folder import step_name


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "name"),
    [*itertools.product(["deleted", "truncated", "emptied", "one byte flipped"], FILES), ("folder gone", "")],
)
def test_damaged(started, alone, table, how, name):
    run = started(8)
    damage_file(checkpoints(run) / step_name(6) / name, how)
    table.tried(f"checkpoint: {how}")
    lost = finish(run)
    assert resumptions(run)[-1] == 4
    same(run, alone(8))
    table.survived(f"checkpoint: {how}", lost)


# Token shards


def token_files(run):
    return {"shard": run / "tokens" / "train" / "shard.00000.mds", "manifest": run / "tokens" / "manifest.json"}


def damaged_tokens(started, alone, table, how, name):
    """All ranks say which file it is before they do a step; with the old file they go on."""
    run, kind = started(12), f"token {name}: {how}"
    path = token_files(run)[name]
    good = path.read_bytes()
    damage_file(path, how)
    table.tried(kind)
    done, begun = last_step(run), time.monotonic()
    codes, output = attempt(job, 2, run)
    assert time.monotonic() - begun < 60
    all_say(codes, output, str(path if name == "shard" else run / "tokens"))
    if name == "shard":
        assert f"Move {run / 'tokens'} away and run the same command again" in " ".join(output.split())
    assert last_step(run) == done
    path.write_bytes(good)
    lost = finish(run)
    same(run, alone(12))
    table.survived(kind, lost)


def test_a_flipped_byte_of_a_token_shard(started, alone, table):
    damaged_tokens(started, alone, table, "one byte flipped", "shard")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "name"),
    [("deleted", "shard"), ("truncated", "shard"), ("deleted", "manifest"), ("emptied", "manifest")],
)
def test_damaged_tokens(started, alone, table, how, name):
    damaged_tokens(started, alone, table, how, name)
