"""Checkpoints that are deleted, cut off or changed: the one before is gone on from."""

from __future__ import annotations

import itertools
import shutil

import pytest
from faults.matrix import FILES, checkpoints, finish, resumptions, same

from trainer.checkpoint_folder import step_name


def damage(run, name, how):
    path = checkpoints(run) / step_name(6) / name
    if how == "folder gone":
        shutil.rmtree(path)
    elif how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "one byte flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "name"),
    [*itertools.product(["deleted", "truncated", "emptied", "one byte flipped"], FILES), ("folder gone", "")],
)
def test_damaged(started, alone, table, how, name):
    run = started(8)
    damage(run, name, how)
    table.tried(f"checkpoint: {how}")
    lost = finish(run)
    assert resumptions(run)[-1] == 4
    same(run, alone(8))
    table.survived(f"checkpoint: {how}", lost)
