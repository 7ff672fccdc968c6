"""One stage, trained by the real launcher on two ranks, and what its settings change of what it learns."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import FIELDS, ROOT, coarse_config, free_port, quantizers
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import STEPS, job, make_run, record, rows, train_all, weights_digest

from model import artifact
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.stage import build_stage
from trainer.metrics_reader import read_metrics

TIMEOUT = 180


def start(run):
    command = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    log = (run / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", *command, "--module", "trainer", "--run", str(run), "--stage", "coarse"],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(run, process):
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"training hung\n{(run / 'log.txt').read_text()}") from None
    return code


def train(run):
    assert finish(run, start(run)) == 0, (run / "log.txt").read_text()
    return run


def interrupt(run, step, number):
    """Starts the training of `run` and ends it by the signal `number` once it has logged `step`."""
    process = start(run)
    deadline = time.monotonic() + TIMEOUT
    while not any(row["step"] >= step for row in read_metrics(run / "coarse" / "metrics.jsonl")):
        assert process.poll() is None, (run / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert finish(run, process) != 0
    assert not (run / "coarse" / artifact.MANIFEST).exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(make_run(tmp_path_factory.mktemp("run")))


def test_a_stage_learns_and_records_how(trained):
    rows = read_metrics(trained / "coarse" / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(6, STEPS + 1, 6))
    assert {"loss", "learning_rate", "gradient_norm", "windows_per_second", "tokens_per_second"} <= rows[1].keys()
    first, *_, last = [row for row in rows if row["kind"] == "validation"]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(256), rel=0.05)
    assert last["loss"] < 0.7 * first["loss"]
    assert len(last["quantizers"]) == 2
    assert list((trained / "coarse" / "tensorboard").iterdir())
    assert (trained / "coarse" / "logs" / "rank-0001.log").exists()


def test_a_stage_shows_what_it_ignores(trained):
    """The acoustic codes follow from the semantic ones alone: taken from another window they mislead."""
    last = [row for row in read_metrics(trained / "coarse" / "metrics.jsonl") if row["kind"] == "validation"][-1]
    assert last["shuffled"][SEMANTIC] > last["loss"] * 1.1
    assert last["shuffled"][CONDITIONING] == pytest.approx(last["loss"], rel=0.05, abs=1e-3)
    assert last["text"] == pytest.approx(last["loss"], rel=0.05)


def test_the_learning_rate_warms_up_and_decays(trained):
    rates = [
        row["learning_rate"] for row in read_metrics(trained / "coarse" / "metrics.jsonl") if row["kind"] == "train"
    ]
    assert max(rates) == rates[0]
    assert rates[-1] < 0.1 * rates[0]


def test_the_weights_are_whole_and_load_without_deepspeed(trained):
    found = artifact.read(trained / "coarse", "stage")
    assert artifact.problems(found) == []
    assert found.info["steps"] == STEPS
    stage = build_stage(coarse_config(pattern="delay"), FIELDS, quantizers())
    stage.load_state_dict(load_file(found.path / "model.safetensors"))
    batch = {name: torch.from_numpy(record(3)[name].astype(np.int64))[None] for name in FIELDS}
    batch |= {SEMANTIC: batch[SEMANTIC][:, :20], ACOUSTIC: batch[ACOUSTIC][:, :40]}
    last = [row for row in read_metrics(trained / "coarse" / "metrics.jsonl") if row["kind"] == "validation"][-1]
    assert stage(batch).mean().item() == pytest.approx(last["loss"], rel=0.3)
    assert all(value.dtype == torch.float32 for value in stage.state_dict().values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_stage_goes_on_to_the_same_weights(trained, tmp_path, number):
    """Killed or told to stop in the middle, the same command ends with the weights of a run that was left alone."""
    run = make_run(tmp_path / "run")
    interrupt(run, 24, number)
    train(run)
    assert "resumed at step" in (run / "coarse" / "logs" / "rank-0000.log").read_text()
    assert weights_digest(run) == weights_digest(trained)
    lines = (run / "coarse" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == list(range(6, STEPS + 1, 6))


def test_dropping_and_masking_stay_on_across_validation_passes(tmp_path):
    """How often a stage validates changes nothing of what it learns; without either of the two it learns otherwise."""
    both = {"condition_dropout": 0.5, "forgetful_masking": 0.5}
    runs = {
        "always": make_run(tmp_path / "always", both, steps=8, validate_every=1),
        "never": make_run(tmp_path / "never", both, steps=8, validate_every=1000),
        "no dropping": make_run(tmp_path / "no dropping", {**both, "condition_dropout": 0.0}, steps=8),
        "no masking": make_run(tmp_path / "no masking", {**both, "forgetful_masking": 0.0}, steps=8),
    }
    run_ranks(train_all, 1, tmp_path / "log", *runs.values())
    weights = {name: load_file(run / "coarse" / "model.safetensors") for name, run in runs.items()}
    assert weights["always"].keys() == weights["never"].keys()
    for name, value in weights["always"].items():
        assert torch.equal(value, weights["never"][name]), name
    # A validation before the first step could switch them off in both: each must be seen to act.
    assert not torch.equal(weights["never"]["heads"], weights["no dropping"]["heads"])
    assert not torch.equal(weights["never"]["heads"], weights["no masking"]["heads"])


LENGTHS = (4.0, 1.5, 0.7, 2.2)
"""Seconds of clips, some shorter than a window of 2 s."""
SHORT = {"steps": 4, "warmup_steps": 1, "log_every": 1, "precision": "fp32", "global_batch": 10}
"""Ten divide the fifty clips: an epoch has the same clips in the same order, whatever the micro batch."""


def test_clips_of_different_lengths_are_packed_and_learnt_from(tmp_path):
    """A stage learns from clips shorter than its window; interrupted, it ends with the same weights."""
    settings = {"lengths": LENGTHS, "steps": 24, "validate_every": 12, "checkpoint_every": 4, "packing": True}
    left_alone, stopped = (make_run(tmp_path / name, **settings) for name in ("left alone", "stopped"))
    interrupt(stopped, 12, signal.SIGTERM)
    for run in (left_alone, stopped):
        run_ranks(job, 2, tmp_path / "log", run)
    assert weights_digest(stopped) == weights_digest(left_alone)
    first, *_, last = rows(left_alone, "validation")
    assert first["loss"] == pytest.approx(math.log(256), rel=0.05)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["shuffled"][SEMANTIC] > last["loss"] * 1.02
    assert (left_alone / "coarse" / "logs" / "rank-0000.log").read_text().count("compile: off") == 1
    figures = rows(left_alone, "train")[-1]
    # Two codes a frame, 20 frames a second, of windows of 2, 1.5, 0.7 and 2 s.
    assert 30 < figures["tokens_per_second"] / figures["windows_per_second"] < 75


def test_packed_windows_are_learnt_from_alike_however_they_are_shared_out(tmp_path):
    """The mean is over all codes of a step, whatever ranks and micro batches there are."""
    settings = {"model": {"condition_dropout": 0.0}, "lengths": LENGTHS, "packing": True, **SHORT}
    shared = {"together": (1, 10), "two ranks": (2, 5), "five micro batches": (1, 2)}
    runs = {
        name: make_run(tmp_path / name, ranks=ranks, micro_batch=micro, **settings)
        for name, (ranks, micro) in shared.items()
    }
    run_ranks(train_all, 1, tmp_path / "one rank", runs["together"], runs["five micro batches"])
    run_ranks(train_all, 2, tmp_path / "two ranks log", runs["two ranks"])
    expected = rows(runs.pop("together"), "train")
    for run in runs.values():
        for row, other in zip(expected, rows(run, "train"), strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
            assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-3)


def test_packing_windows_of_one_length_changes_nothing_but_rounding(tmp_path):
    """What is dropped and forgotten included: it is drawn alike."""
    settings = {"model": {"condition_dropout": 0.5, "forgetful_masking": 0.5}, **SHORT}
    runs = [make_run(tmp_path / f"{packing}", packing=packing, **settings) for packing in (False, True)]
    run_ranks(train_all, 1, tmp_path / "log", *runs)
    for kind in ("train", "validation"):
        for row, other in zip(*(rows(run, kind) for run in runs), strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    apart, packed = (rows(run, "validation")[-1] for run in runs)
    assert packed["shuffled"] == pytest.approx(apart["shuffled"], rel=1e-4)
