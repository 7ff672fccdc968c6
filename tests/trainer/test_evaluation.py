"""What a validation says, and that it leaves no trace in the training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import FIELDS, quantizers
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import make_run, rows, train_all, weights_digest

from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.stage import build_stage
from trainer import random_state
from trainer.batches import open_loader
from trainer.evaluation import Evaluation
from trainer.setup import StageSetup

SHORT = {"steps": 6, "warmup_steps": 1, "log_every": 3, "validate_every": 3, "checkpoint_every": 6}
LENGTHS = (4.0, 1.5, 0.7, 2.2)
"""Seconds of clips, some shorter than a window of 2 s."""


def validate_and_look(run):
    """Validates in the middle of a step's work and compares what it must not touch."""
    from trainer.engine import Engine, start_process_group
    from trainer.training import Training

    start_process_group()
    setup = StageSetup.read(run, "coarse")
    training = Training(setup, Engine(setup.build_model(), setup.config.train))
    evaluation = next(callback for callback in training.callbacks if isinstance(callback, Evaluation))
    module = training.engine.module
    training.engine.train_step(training.data.take(1))
    before, place, mode = random_state.capture(), training.state_dict(), [part.training for part in module.modules()]
    weights = {name: value.clone() for name, value in training.engine.full_weights()}
    first, second = evaluation.figures(), evaluation.figures()
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in random_state.capture().items())
    assert training.state_dict() == place
    assert [part.training for part in module.modules()] == mode
    assert all(torch.equal(value, weights[name]) for name, value in training.engine.full_weights())
    torch.distributed.destroy_process_group()


def expected(run, precision):
    """Loss and accuracy of each quantizer, `[2, quantizers]`, over all codes of the validation set, from all logits."""
    setup = StageSetup.read(run, "coarse")
    stage = build_stage(setup.config.model, FIELDS, quantizers())
    stage.load_state_dict(load_file(run / "coarse" / "model.safetensors"))
    if precision == "bf16":
        for weight in stage.parameters():
            weight.data = weight.data.bfloat16()
    losses, hits = [], []
    for batch in open_loader(setup, "validation", 3, 0.0):
        for window in batch if isinstance(batch, list) else [batch]:
            with torch.no_grad():
                logits, codes = stage.logits(window).float().flatten(0, 1), stage.own_codes(window).flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none"))
            hits.append((logits.argmax(-1) == codes).float())
    return torch.stack([torch.cat(losses).mean(0), torch.cat(hits).mean(0)])


@pytest.mark.parametrize("ranks", [1, 2])
def test_figures_are_what_all_logits_give(tmp_path, ranks):
    """Ten windows in batches of four, of which the last is smaller, or packed ones of different lengths."""
    cases = [("zero0", "fp32", False), ("zero2", "fp32", True), ("zero3", "bf16", False), ("zero3", "bf16", True)]
    runs = {}
    for zero, precision, packing in cases:
        settings = {"zero": zero, "precision": precision, "packing": packing, "lengths": LENGTHS if packing else (4.0,)}
        folder = tmp_path / f"{zero} {precision} {packing}"
        runs[make_run(folder, micro_batch=4, **settings, **{**SHORT, "steps": 12})] = precision
    run_ranks(train_all, ranks, tmp_path / "log", *runs)
    for run, precision in runs.items():
        check_figures(run, precision)


def check_figures(run, precision):
    row = rows(run, "validation")[-1]
    losses, accuracies = expected(run, precision)
    near = {"rel": 1e-4} if precision == "fp32" else {"rel": 1e-2}
    assert row["quantizers"] == pytest.approx(losses.tolist(), **near)
    assert row["loss"] == pytest.approx(losses.mean().item(), **near)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert 0.02 < row["accuracy"] < 1
    assert row["accuracy"] == pytest.approx(accuracies.mean().item(), abs=0.02)
    assert list(row[ACOUSTIC]) == ["0", "1"]
    for figures, loss, accuracy in zip(row[ACOUSTIC].values(), losses.tolist(), accuracies.tolist(), strict=True):
        assert figures["loss"] == pytest.approx(loss, **near)
        assert figures["accuracy"] == pytest.approx(accuracy, abs=0.02)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_a_validation_changes_nothing(tmp_path):
    run_ranks(validate_and_look, 2, tmp_path / "log", make_run(tmp_path / "run", zero="zero3", **SHORT))


def test_how_often_a_stage_validates_is_all_the_same_to_its_weights(tmp_path):
    cases = [{"zero": "zero1", "packing": False}, {"zero": "zero3", "packing": True}]
    runs = [
        [
            make_run(tmp_path / f"{case['zero']} {every}", **SHORT | case | {"validate_every": every})
            for every in (1, 99)
        ]
        for case in cases
    ]
    run_ranks(train_all, 2, tmp_path / "log", *runs[0], *runs[1])
    for often, never in runs:
        assert [row["step"] for row in rows(often, "validation")] == [0, 1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in rows(never, "validation")] == [0, 6]
        assert weights_digest(often) == weights_digest(never)


def test_a_large_validation_set_can_be_cut(tmp_path):
    setup = StageSetup.read(make_run(tmp_path / "run", validate_windows=4), "coarse")
    loader = open_loader(setup, "validation", 3, 0.0)
    first, second = (torch.cat([batch[ACOUSTIC] for batch in loader]) for _ in range(2))
    assert len(first) == 4
    assert torch.equal(first, second)


class Recorder:
    """An engine that keeps what it is given; its loss of a window is the window's first semantic code."""

    micro_batch = 1
    device = torch.device("cpu")
    module = SimpleNamespace(quantizers=range(2))

    def __init__(self):
        self.given = []

    def evaluate(self, batch):
        self.given.append(batch)
        return torch.full((2, 2), float(batch[SEMANTIC][0, 0, 0]))

    def mean(self, value):
        return value


def test_a_condition_comes_from_another_window_even_when_windows_come_one_by_one(tmp_path):
    engine = Recorder()
    figures = Evaluation(StageSetup.read(make_run(tmp_path / "run"), "coarse"), engine).figures()
    windows, described, misled = (engine.given[:30][place::3] for place in range(3))
    assert len(windows) == 10
    for before, window, other in zip(windows, windows[1:], misled[1:], strict=False):
        assert torch.equal(other[SEMANTIC], before[SEMANTIC])
        assert torch.equal(other[ACOUSTIC], window[ACOUSTIC])
    for before, window, other in zip(windows, windows[1:], described[1:], strict=False):
        assert torch.equal(other[CONDITIONING], before[CONDITIONING])
        assert torch.equal(other[SEMANTIC], window[SEMANTIC])
    mean = sum(float(window[SEMANTIC][0, 0, 0]) for window in windows) / 10
    assert figures["loss"] == figures["text"] == pytest.approx(mean)


@pytest.mark.parametrize("name", ["los", "accuracy", "step"])
def test_the_best_checkpoint_is_judged_by_a_figure_there_is(tmp_path, name):
    setup = StageSetup.read(make_run(tmp_path / "run", keep_best=name), "coarse")
    with pytest.raises(UserError, match=r"stages.coarse.train.keep_best .*Choose loss, perplexity, text"):
        Evaluation(setup, Recorder())
