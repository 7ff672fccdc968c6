"""The moving average of the weights, kept in the optimizer's state and sharded with it."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import checkpoint, holdings, make_run, train_all

from trainer.optimizer import AdamW

DECAY = 0.8
STEPS = 8
CHOICES = [("zero0", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"), ("zero3", "bf16")]


@pytest.mark.parametrize(("zero", "precision"), CHOICES)
def test_it_is_the_average_of_the_weights_after_each_step(tmp_path, zero, precision):
    """Of the fp32 weights, whatever the model computes with; the trained weights stay apart."""
    settings = {"zero": zero, "precision": precision, "ema_decay": DECAY, "steps": STEPS, "warmup_steps": 1}
    run = make_run(tmp_path / "run", checkpoint_every=1, keep_last=99, validate_every=99, **settings)
    run_ranks(train_all, 2, tmp_path / "log", run)
    weights = [holdings(checkpoint(run, step)) for step in range(1, STEPS + 1)]
    average = load_file(run / "coarse" / "average.safetensors")
    final = load_file(run / "coarse" / "model.safetensors")
    assert average.keys() == final.keys()
    for name, found in average.items():
        # The average starts as the first weights, which the first step's share shows: d = (1 + 1) / (10 + 1) there.
        decays = [min(DECAY, (1 + step) / (10 + step)) for step in range(1, STEPS + 1)]
        first = weights[0]["weights", name]
        expected = weights[0]["average", name]
        assert not torch.equal(expected, first)
        for decay, holding in zip(decays[1:], weights[1:], strict=True):
            expected = decay * expected + (1 - decay) * holding["weights", name]
        assert torch.allclose(found.flatten(), expected, rtol=1e-4, atol=1e-6), name
        assert torch.equal(final[name].flatten(), weights[-1]["weights", name])


def test_a_step_left_out_changes_nothing():
    """Neither weights, moments, their count nor the average; without averages none is kept."""
    weights = torch.nn.Parameter(torch.arange(8.0))
    optimizer = AdamW([weights], 0.1, (0.9, 0.95), 1.0, DECAY, torch.device("cpu"))
    for gradient in (1.0, 2.0):
        weights.grad = torch.full_like(weights, gradient)
        optimizer.judge(torch.zeros(()))
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weights].items()}, weights.detach().clone()
    for bad, gradient in ((1.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        weights.grad = torch.full_like(weights, gradient)
        optimizer.judge(torch.tensor(bad))
        optimizer.step()
        assert optimizer.skipped == 1
        assert torch.equal(weights, before[1])
        assert all(torch.equal(value, before[0][name]) for name, value in optimizer.state[weights].items())
    plain = AdamW([weights], 0.1, (0.9, 0.95), 1.0, None, torch.device("cpu"))
    plain.initialise(weights)
    assert set(plain.state[weights]) == {"step", "exp_avg", "exp_avg_sq"}


def test_it_steps_as_torch_does_and_clips():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    optimizer = AdamW([{"params": [ours], "weight_decay": 0.1}], 0.05, (0.9, 0.95), 0.5, None, torch.device("cpu"))
    reference = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(5):
        gradient = torch.randn(9, generator=torch.Generator().manual_seed(number)) * (0.01 if number == 3 else 1)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.judge(torch.zeros(()))
        optimizer.step()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert optimizer.last_norm == pytest.approx(gradient.norm().item())
