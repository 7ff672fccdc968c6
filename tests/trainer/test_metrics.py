"""The rows that training writes of itself, and what reads them, in jobs of tiny stages."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import FIELDS, SMALL, coarse_config, quantizers
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import job, log_of, make_run, rows

from model.counting import count_stage
from model.initialisation import parameter_groups
from model.stage import build_stage
from trainer.callback import Callback
from trainer.flops import ModelFlops
from trainer.metrics_reader import last_metrics, read_metrics
from trainer.metrics_writer import JsonLines

PEAK = 1e12
WINDOW = 2.0
"""Seconds; of the coarse stage's two codes a frame, 20 frames a second."""
TOKENS = int(WINDOW * 20 * 2)


def centroid_dims():
    return {name: value.shape[-1] for name, value in quantizers().items()}


# What the rows say


def on_a_known_device(run):
    import trainer.flops

    trainer.flops.peak_flops = lambda name, precision: PEAK
    return job(run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    run = make_run(folder / "run", steps=12, log_every=4, validate_every=6, checkpoint_every=6, profile=(6, 7))
    run_ranks(on_a_known_device, 2, folder / "ranks", run)
    return run


def test_a_row_says_how_training_goes(trained):
    found = rows(trained, "train")
    assert [row["step"] for row in found] == [4, 8, 12]
    for row in found:
        assert row["loss"] == pytest.approx(sum(row["quantizers"]) / 2)
        assert row["consumed"] == {"windows": 8 * row["step"], "tokens": 8 * row["step"] * TOKENS}
        assert (row["updates"], row["skipped"]) == (row["step"], 0)
        assert row["windows_per_second"] == pytest.approx(8 / row["step_seconds"])
        assert row["tokens_per_second"] == pytest.approx(TOKENS * row["windows_per_second"])
        assert row["audio_seconds_per_second"] == pytest.approx(WINDOW * row["windows_per_second"])
        assert 0 < row["data_wait"] < 1
        assert 0 <= row["checkpoint_stall"] < 1
        assert row["memory"] > 50e6
        own = row["rank_seconds"]
        assert 0 < own["min"] <= own["median"] <= own["max"] < row["step_seconds"]
    assert found[1]["checkpoint_stall"] > found[0]["checkpoint_stall"] == 0


def test_mfu_is_the_formulas_flops_by_the_peak_of_all_devices(trained):
    flops = count_stage(coarse_config(pattern="delay"), FIELDS, centroid_dims()).training_flops
    for row in rows(trained, "train"):
        assert row["mfu"] == pytest.approx(row["windows_per_second"] * flops / (2 * PEAK))


def test_flops_of_packed_windows_go_by_their_own_lengths():
    model = build_stage(coarse_config(), FIELDS, quantizers())
    counted = [
        count_stage(coarse_config(window_seconds=seconds), FIELDS, centroid_dims()).training_flops
        for seconds in (2.0, 0.5)
    ]
    flops = ModelFlops(model, "bf16", torch.device("cpu"))
    assert flops.of({40: 3, 10: 2}) == 3 * counted[0] + 2 * counted[1]
    assert flops.peak is None


def test_tensorboard_has_the_same_figures(trained):
    board = EventAccumulator(str(trained / "coarse" / "tensorboard")).Reload()
    for name in ("loss", "mfu", "data_wait"):
        expected = {row["step"]: pytest.approx(row[name], rel=1e-5) for row in rows(trained, "train")}
        assert {event.step: event.value for event in board.Scalars(f"train/{name}")} == expected
    assert "train/quantizers/1" in board.Tags()["scalars"]


def test_a_few_steps_are_profiled_on_rank_0(trained):
    (trace,) = (trained / "coarse" / "profile").iterdir()
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    groups = parameter_groups(build_stage(coarse_config(), FIELDS, quantizers()), SMALL, 1e-3, 0.1)
    assert names.count("aten::_fused_adamw_") == 2 * len(groups)  # once a step
    assert f"profile of steps 6 to 7: {trace}" in log_of(trained)
    assert "profile" not in log_of(trained, rank=1)


# Losses that are not numbers


def with_bad_losses(run):
    from model.stage import StageTransformer

    class Spoil(Callback):
        def before_step(self, training):
            if training.step == 4:
                forward = StageTransformer.forward
                StageTransformer.forward = lambda *given, **named: forward(*given, **named) * float("nan")

    return job(run, Spoil())


def test_a_loss_that_is_not_finite_is_null_and_counted(tmp_path):
    """Every line is plain JSON, which has no NaN."""
    run = make_run(tmp_path / "run", steps=6, log_every=2, validate_every=100, checkpoint_every=100)
    run_ranks(with_bad_losses, 1, tmp_path / "ranks", run)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run / "coarse" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    *good, bad = rows(run, "train")
    assert all(row["loss"] > 0 and "finite" not in row for row in good)
    assert (bad["loss"], bad["quantizers"], bad["gradient_norm"], bad["finite"]) == (None, [None, None], None, False)
    assert (bad["skipped"], bad["updates"]) == (2, 4)


# Reading and writing


def test_a_kill_while_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 5))
    path.write_text(text)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, 2)
    assert path.read_text() == text
    monkeypatch.undo()
    JsonLines(path, 2).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_start_from_scratch_keeps_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "validation", "step": 0}\n')
    JsonLines(path, 0).close()
    assert read_metrics(path) == []


def test_the_last_row_of_a_rare_kind_is_found_far_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train = json.dumps({"kind": "train", "step": 2, "figures": [0.5] * 100}) + "\n"
    path.write_text('{"kind": "checkpoint", "step": 1}\n' + train * 1000)
    assert last_metrics(path, "checkpoint") == {"kind": "checkpoint", "step": 1}
    assert last_metrics(path, "validation") is None
