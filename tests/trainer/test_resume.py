"""Going on from a checkpoint: bit for bit on the same ranks, and within rounding on others or under another ZeRO."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from ranks import run_ranks
from training_runs import checkpoint, copied, holdings, make_run, reload, rows, train_all

from trainer.checkpoint import rank_file
from trainer.tensor_files import SlicedTensors, write_tensors

EXACT = {"steps": 10, "warmup_steps": 2, "log_every": 1, "validate_every": 5, "checkpoint_every": 1, "keep_last": 99}
"""Fifty clips and eight a step: an epoch has six steps."""
POINTS = {"in an epoch": 4, "at its end": 6, "after it": 7}
ELASTIC = {"steps": 26, "warmup_steps": 2, "log_every": 1, "validate_every": 99, "checkpoint_every": 6, "keep_last": 99}
SAVED = 6


def files(folder):
    """What a checkpoint holds, byte for byte, but for its manifest, which has times and versions."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def cases(every, sample):
    """Parameters of all cases: those in `sample` are for `make test`, the others for `make faults`."""
    return [pytest.param(*case, marks=[] if case in sample else [pytest.mark.faults]) for case in every]


ZEROS = ("zero0", "zero1", "zero2", "zero3")
ALTERNATING = [
    (zero, ranks, 2 * ((number + ranks) % 2), ("fp32", "bf16")[(number // 2 + ranks) % 2])
    for number, zero in enumerate(ZEROS)
    for ranks in (1, 2)
]
OFFLOADED = [("zero2_offload", 2, 0, "bf16"), ("zero3_offload", 2, 0, "bf16")]


@pytest.mark.parametrize(
    ("zero", "ranks", "workers", "precision"),
    cases([*product(ZEROS, (1, 2), (0, 2), ("fp32", "bf16")), *OFFLOADED], [*ALTERNATING, *OFFLOADED]),
)
def test_resume_is_exact(tmp_path, zero, ranks, workers, precision):
    """In the middle of an epoch, at its end and after it: weights, optimizer, random numbers, losses."""
    settings = {"zero": zero, "workers": workers, "precision": precision, "ema_decay": 0.9}
    run = make_run(tmp_path / "run", **EXACT, **settings)
    run_ranks(train_all, ranks, tmp_path / "log", run)
    resumed = {name: copied(run, tmp_path / name, step) for name, step in POINTS.items()}
    run_ranks(train_all, ranks, tmp_path / "resumed log", *resumed.values())
    for name, other in resumed.items():
        assert files(checkpoint(other, EXACT["steps"])) == files(checkpoint(run, EXACT["steps"])), name
        for kind in ("train", "validation"):
            for row, again in zip(rows(run, kind), rows(other, kind), strict=True):
                assert again["loss"] == row["loss"], (name, row["step"])
        weights = [folder / "coarse" / "model.safetensors" for folder in (run, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs of 26 steps on one and on two ranks, by ZeRO choice and ranks; made when asked for."""
    made = {}

    def get(zero, ranks):
        if (zero, ranks) not in made:
            folder = tmp_path_factory.mktemp(f"{zero}-{ranks}")
            run = make_run(folder / "run", global_batch=12, zero=zero, precision="fp32", ema_decay=0.9, **ELASTIC)
            run_ranks(train_all, ranks, folder / "log", run)
            made[zero, ranks] = run
        return made[zero, ranks]

    return get


CHANGES = [
    *((zero, *ranks, zero) for zero in ZEROS[1:] for ranks in ((2, 1), (1, 2), (2, 3), (2, 4))),
    ("zero2", 2, 2, "zero3"),
    ("zero3", 2, 2, "zero2"),
    ("zero3", 2, 3, "zero0"),
    ("zero0", 2, 1, "zero1"),
]
SAMPLE = [
    ("zero1", 2, 3, "zero1"),
    ("zero1", 2, 1, "zero1"),
    ("zero2", 1, 2, "zero2"),
    ("zero3", 2, 4, "zero3"),
    ("zero3", 2, 2, "zero2"),
    ("zero2", 2, 2, "zero3"),
    ("zero3", 2, 3, "zero0"),
]


@pytest.mark.parametrize(("zero", "ranks", "new_ranks", "new_zero"), cases(CHANGES, SAMPLE))
def test_a_run_goes_on_with_other_ranks_and_zero(tmp_path, uninterrupted, zero, ranks, new_ranks, new_zero):
    """What is loaded is what was saved, to the bit; the next twenty losses are those of the run left alone."""
    alone = uninterrupted(zero, ranks)
    run = copied(alone, tmp_path / "run", SAVED, zero=new_zero)
    dump = tmp_path / "dump"
    run_ranks(reload, new_ranks, tmp_path / "reload log", run, dump)
    before, after = holdings(checkpoint(alone, SAVED)), holdings(dump / f"step-{SAVED:08d}")
    assert {kind for kind, _ in after} == {"weights", "exp_avg", "exp_avg_sq", "average"}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    run_ranks(train_all, new_ranks, tmp_path / "log", run)
    expected = [row["loss"] for row in rows(alone, "train")][SAVED:]
    found = [row["loss"] for row in rows(run, "train")][SAVED:]
    assert len(found) == 20
    assert found == pytest.approx(expected, rel=1e-3)
    last = [json.loads((checkpoint(folder, 26) / "state.json").read_text()) for folder in (run, alone)]
    assert last[0]["data"] == last[1]["data"]
    assert last[0]["consumed"] == last[1]["consumed"]


def test_every_zero_learns_alike(tmp_path):
    """Fifty steps from one seed, in fp32."""
    settings = {"steps": 50, "log_every": 1, "validate_every": 99, "checkpoint_every": 99, "precision": "fp32"}
    settings["learning_rate"] = 1e-3  # at which the loss does not come near zero, where rounding is all there is
    runs = {zero: make_run(tmp_path / zero, zero=zero, **settings) for zero in ("zero0", "zero1", "zero2", "zero3")}
    run_ranks(train_all, 2, tmp_path / "log", *runs.values())
    losses = {zero: [row["loss"] for row in rows(run, "train")] for zero, run in runs.items()}
    assert len(losses["zero0"]) == 50
    for zero in ("zero1", "zero2", "zero3"):
        assert losses[zero] == pytest.approx(losses["zero0"], rel=1e-5), zero


def test_a_slice_in_no_file_is_an_error(tmp_path):
    write_tensors(tmp_path / rank_file(0), {"weights/a/0": torch.arange(4.0)})
    write_tensors(tmp_path / rank_file(1), {"weights/a/6": torch.arange(2.0)})
    tensors = SlicedTensors([tmp_path / rank_file(rank) for rank in (0, 1)])
    target = torch.empty(2)
    tensors.read("weights", "a", 1, target)
    assert target.tolist() == [1.0, 2.0]
    with pytest.raises(KeyError, match="elements 4 to 8"):
        tensors.read("weights", "a", 3, torch.empty(5))
