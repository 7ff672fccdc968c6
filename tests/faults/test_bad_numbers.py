"""Numbers that are not finite, losses that jump and codes that are none: no bad step reaches the weights."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import time

import pytest
import torch
from faults.matrix import SETTINGS, all_say, attempt, finish, good_steps, last_step, same
from ranks import run_ranks
from training_runs import change, checkpoint, holdings, job, make_run, rows

from trainer.callback import Callback
from trainer.exit_codes import DIVERGED, FAULT

KINDS = ("NaN in the loss", "NaN in a gradient", "infinity in a gradient", "NaN in a batch", "a spike of the loss")
STEPS = 24
BAD = {5 + 2 * number: case for number, case in enumerate(itertools.product(KINDS[:4], (0, 1)))}
"""After so many steps comes a bad one of that kind, on that rank alone."""
BAD |= {6: BAD[5], 21: (KINDS[4], 0), 22: (KINDS[4], 1)}
KILLS = (8, 16)
"""After so many steps one rank is killed."""


class Spoiler(Callback):
    """Spoils the last micro batch of the steps in `bad`, and sees that these and only these change nothing."""

    def __init__(self, bad, kill):
        from model.stage import StageTransformer

        self.bad, self.kill = bad, kill
        self.kind = None
        """What is to happen on this rank in this step."""
        self.left = 0
        """Micro batches before the last one of a step."""
        self.forward = StageTransformer.forward
        StageTransformer.forward = lambda stage, *given, **named: self.spoilt(stage, *given, **named)

    def spoilt(self, stage, *given, **named):
        kind = self.kind if self.left == 0 else None
        self.left -= 1
        if kind == "NaN in a batch":
            spoil_once(stage.embedding.register_forward_hook)
        if kind in ("NaN in a gradient", "infinity in a gradient"):
            value = float("nan") if kind == "NaN in a gradient" else float("inf")
            spoil_once(stage.embedding.weight.register_hook, value)
        losses = self.forward(stage, *given, **named)
        return losses * {"NaN in the loss": float("nan"), "a spike of the loss": 1e3}.get(kind, 1.0)

    def before_step(self, training):
        if training.step == self.kill and training.engine.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        kind, rank = self.bad.get(training.step, (None, 0))
        self.kind = kind if training.engine.rank == rank else None
        self.left = training.engine.accumulation - 1
        self.before = state(training)

    def after_step(self, training, losses):
        changed = state(training) != self.before
        assert changed == (training.step - 1 not in self.bad), f"after step {training.step}"

    def on_end(self, training):
        assert all(bool(weights.isfinite().all()) for _, weights in training.engine.full_weights())
        if training.config.zero != "zero3":  # where no rank has what another has
            assert len(set(training.engine.gather(digest(training.engine.module.parameters())))) == 1


def spoil_once(register, value=float("nan")):
    """Registers a hook that goes after its first call and spoils one element of the tensor it is given last."""

    def spoil(*given):
        handle.remove()
        tensor = given[-1].clone()
        tensor.view(-1)[0] = value
        return tensor

    handle = register(spoil)


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def state(training):
    """Of what this rank holds: updates, fp32 weights, moments, average; and the weights it computes with."""
    held = [values for fragment in training.engine.held() for values in fragment.tensors.values()]
    own = [getattr(weights, "ds_tensor", weights) for weights in training.engine.module.parameters()]  # ZeRO-3's part
    return training.engine.updates, digest([*held, *own])


def spoilt(run, bad, kill=None):
    """A job with steps that are bad, of which rank 1 is killed after `kill` steps."""
    import trainer.training
    from trainer import spikes

    spikes.SETTLING = 5
    usual = trainer.training.callbacks
    trainer.training.callbacks = lambda setup, engine: [*usual(setup, engine), Spoiler(bad, kill)]
    return job(run)


EVERY = list(itertools.product(("zero0", "zero1", "zero2", "zero3"), ("fp32", "bf16")))
SAMPLE = [("zero2", "bf16")]


@pytest.mark.parametrize(
    ("zero", "precision"), [pytest.param(*c, marks=[] if c in SAMPLE else [pytest.mark.faults]) for c in EVERY]
)
def test_bad_steps_are_left_out(tmp_path, table, zero, precision):
    """On all ranks alike; and killed amid them the run goes on as one that was not."""
    settings = {**SETTINGS, "steps": STEPS, "micro_batch": 1, "zero": zero, "precision": precision, "ema_decay": 0.9}
    alone, run = (make_run(tmp_path / name / "run", **settings) for name in ("alone", "killed"))
    for kind, _ in BAD.values():
        table.tried(kind)
    run_ranks(spoilt, 2, tmp_path / "log", alone, BAD)
    last = rows(alone, "train")[-1]
    assert (last["skipped"], last["updates"]) == (len(BAD), STEPS - len(BAD))
    for kind, _ in BAD.values():
        table.survived(kind)
    for kill in KILLS:
        table.tried("SIGKILL amid steps that are left out")
        codes, output = attempt(spoilt, 2, run, BAD, kill)
        assert codes[1] == -signal.SIGKILL, output
        table.survived("SIGKILL amid steps that are left out", last_step(run) - good_steps(run)[0])
    finish(run, function=spoilt, arguments=(BAD,))
    same(run, alone)


def test_a_loss_that_stays_bad_ends_the_training(started, alone, tmp_path, table):
    """With the weights of the last good step; from there the same command goes on once the losses are good again."""
    kind = "NaN in the loss of every step"
    table.tried(kind)
    run = started(16, most_bad_steps=3)
    forever = dict.fromkeys(range(8, 16), (KINDS[0], 1))
    codes, output = attempt(spoilt, 2, run, forever)
    all_say(codes, output, "in all steps after 8, the last good one, whose weights are saved", DIVERGED)
    assert good_steps(run)[0] == 11
    saved, good = holdings(checkpoint(run, 11)), holdings(checkpoint(alone(8), 8))
    assert saved.keys() == good.keys()
    assert all(torch.equal(saved[key], good[key]) for key in good)
    codes, output = attempt(spoilt, 2, run, forever)  # as long as nothing has changed it says so again
    assert codes == [DIVERGED, DIVERGED], output
    unended = make_run(tmp_path / "unended" / "run", **SETTINGS, steps=16)
    change(unended, most_bad_steps=99)
    left_out = dict.fromkeys(range(8, last_step(run)), (KINDS[0], 1))
    run_ranks(spoilt, 2, tmp_path / "log", unended, left_out)
    lost = finish(run)
    same(run, unended)
    table.survived(kind, lost)


def with_a_wrong_code(run, rank):
    """A job whose third batch on `rank` has a code that is not in the codebook."""
    from trainer.batches import TrainingBatches

    usual, batches = TrainingBatches._with_dropped, []

    def with_dropped(self, batch):
        batches.append(batch)
        if len(batches) == 3:
            batch["acoustic"][0, 0, 0] = 60000
        return usual(self, batch)

    if os.environ["RANK"] == str(rank):
        TrainingBatches._with_dropped = with_dropped
    return job(run)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_code_that_is_not_in_the_codebook(started, alone, table, rank):
    """The rank that has it says so, and the others end with it."""
    kind = "a code out of range in a batch"
    table.tried(kind)
    run, begun = started(12), time.monotonic()
    codes, output = attempt(with_a_wrong_code, 2, run, rank)
    assert time.monotonic() - begun < 60
    assert (codes[rank], codes[1 - rank]) == (2, FAULT), output
    assert "60000" in output.partition("error: ")[2], output
    assert output.count("error: ") == 1, output
    lost = finish(run)
    same(run, alone(12))
    table.survived(kind, lost)
