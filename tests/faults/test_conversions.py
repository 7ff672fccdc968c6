"""Conversions that are killed at any moment and started again."""

from __future__ import annotations

import random
import signal
import time

import pytest
import torch
from ranks import start_ranks

from model import artifact
from trainer import checkpoint_folder
from trainer.tensor_files import WEIGHTS, slice_name, write_tensors

SHAPES = {f"layer.{number}": (64, 32 + number) for number in range(12)}
SLOW = 0.02
"""Seconds that each file takes longer: what is killed must be under way for some time."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One of Stretto's, of two ranks, with random weights and moments."""
    folder = tmp_path_factory.mktemp("made") / "step-00000007"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    held = [{}, {}]
    for kind in (WEIGHTS, "exp_avg", "exp_avg_sq"):
        for name, (rows, columns) in SHAPES.items():
            values = torch.randn(rows * columns, generator=generator)
            for rank, (start, part) in enumerate(zip((0, 1000), (values[:1000], values[1000:]), strict=True)):
                held[rank][slice_name(kind, name, start)] = part
    for rank, tensors in enumerate(held):
        write_tensors(folder / checkpoint_folder.rank_file(rank), tensors)
    (folder / checkpoint_folder.STATE).write_text('{"updates": 7, "consumed": {"windows": 56}}')
    info = {
        "step": 7,
        "world_size": 2,
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "versions": {"deepspeed": "0.19.8"},
        "config": {"model": {"field": "acoustic"}},
    }
    checkpoint_folder.seal(folder, {}, info, artifact.describe_files(folder))
    return folder


def slowly(source, output, to, folder):
    """For `start_ranks`: a conversion that can be killed amid its files. Notes in `folder` when it begins, and how long
    it took."""
    from trainer import convert

    make = convert.make

    def slow_make(folder, output):
        time.sleep(SLOW)
        return make(folder, output)

    convert.make = slow_make
    started = time.monotonic()
    (folder / "begun").touch()
    convert.convert(source, output, to, largest_file=20_000)
    (folder / "lasted").write_text(str(time.monotonic() - started))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", ["fp32", "universal"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_a_conversion_killed_at_any_moment_ends_with_the_same_bytes(checkpoint, tmp_path, to, kills):
    def start(output):
        return start_ranks(slowly, 1, tmp_path / "log", checkpoint, output, to, tmp_path)

    assert start(tmp_path / "whole").wait() == [0]
    lasted = float((tmp_path / "lasted").read_text())
    expected = contents(tmp_path / "whole")
    moments, killed = random.Random(7), 0
    for number in range(kills):
        output = tmp_path / f"out {number}"
        (tmp_path / "begun").unlink()
        ranks = start(output)
        while ranks.alive() and not (tmp_path / "begun").exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 1) * lasted)
        ranks.send(signal.SIGKILL)
        killed += ranks.wait() != [0]
        left = contents(output) if output.exists() else None
        assert left is None or left.keys() >= expected.keys()
        if left != expected:
            assert start(output).wait() == [0], ranks.output()
        assert contents(output) == expected
    assert killed >= kills // 2
