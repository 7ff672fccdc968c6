"""How a stage is computed changes what it costs, not what comes out."""

from __future__ import annotations

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch
from torch._dynamo.utils import counters

from model.config import ExecutionConfig, TransformerConfig
from model.dropping import Dropped, draw_dropped
from model.fields import ACOUSTIC
from model.stage import build_stage

DEEP = TransformerConfig(dim=64, layers=3, heads=2)


def build(**changes):
    torch.manual_seed(0)
    return build_stage(coarse_config(transformer=DEEP, **changes), FIELDS, quantizers())


def loss_and_gradients(stage, batch):
    stage.zero_grad()
    loss = stage(batch).mean()
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in stage.named_parameters()}


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputation_gives_the_same_gradients_bit_for_bit(recompute):
    stage, batch = build(), random_batch()
    plain = loss_and_gradients(stage, batch)
    stage.configure(ExecutionConfig(recompute=recompute))
    again = loss_and_gradients(stage, batch)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_a_compiled_stage_gives_the_same_and_is_compiled_once(recompute):
    torch._dynamo.reset()
    counters.clear()
    stage = build()
    plain = loss_and_gradients(stage, random_batch())
    stage.configure(ExecutionConfig(compile="on", recompute=recompute))
    compiled = loss_and_gradients(stage, random_batch())
    assert torch.allclose(plain[0], compiled[0], atol=1e-5)
    for name, gradient in plain[1].items():
        assert torch.allclose(gradient, compiled[1][name], atol=1e-5), name
    with torch.no_grad():
        stage(random_batch())  # a validation
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2  # with and without gradients; not one for each block
    for seed in range(1, 4):
        loss_and_gradients(stage, random_batch(seed=seed))
        with torch.no_grad():
            stage(random_batch(seed=seed))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("pattern", ["flat", "delay"])
def test_packed_windows_have_the_loss_of_padded_ones(pattern, attention):
    stage = build(pattern=pattern)
    stage.configure(ExecutionConfig(attention=attention))
    lengths = [2.0, 0.7, 1.3]
    windows = [random_batch(seconds=seconds, batch=1, seed=seed) for seed, seconds in enumerate(lengths)]
    apart = torch.stack([stage(window) for window in windows])
    frames = torch.tensor([window[ACOUSTIC].shape[1] for window in windows])
    expected = (apart * frames[:, None]).sum(0) / frames.sum()
    packed = stage.packed(windows)
    assert torch.allclose(packed, expected, atol=1e-5)
    parameters = list(stage.parameters())
    for one, other in zip(
        torch.autograd.grad(packed.mean(), parameters),
        torch.autograd.grad(expected.mean(), parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-6)


def test_packed_windows_of_one_length_have_the_loss_of_the_batch():
    stage, batch = build(), random_batch()
    config = coarse_config(condition_dropout=0.5, forgetful_masking=0.0)
    draws, shape = torch.arange(2, 5), stage.own_codes(batch).shape[1:]
    dropped = draw_dropped(config, draws, *shape)
    assert 0 < dropped.conditions_BN.sum() < dropped.conditions_BN.numel()
    windows = [{name: codes[i : i + 1] for name, codes in batch.items()} for i in range(3)]
    packed = stage.packed(windows, [draw_dropped(config, draws[i : i + 1], *shape) for i in range(3)])
    assert torch.allclose(packed, stage(batch, dropped), atol=1e-5)


def test_forgotten_codes_are_not_seen_and_still_predicted():
    stage = build(forgetful_masking=0.5)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch()
    forgotten = torch.zeros_like(stage.own_codes(batch), dtype=torch.bool)
    forgotten[:, 5:10] = True
    other = {**batch, ACOUSTIC: batch[ACOUSTIC].clone()}
    other[ACOUSTIC][:, 5:10] = (other[ACOUSTIC][:, 5:10] + 1) % 256
    keep = stage.keep_all(3)
    assert torch.equal(stage.logits(batch, Dropped(keep, forgotten)), stage.logits(other, Dropped(keep, forgotten)))
    assert not torch.allclose(stage.logits(batch), stage.logits(other), atol=1e-3)
    assert not torch.allclose(stage(batch, Dropped(keep, forgotten)), stage(other, Dropped(keep, forgotten)))
