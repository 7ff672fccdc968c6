"""What the fused loss and recomputation are for: fewer bytes, counted by torch's allocator."""

from __future__ import annotations

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from benchmarks.memory import measure
from model import loss
from model.config import ExecutionConfig, TransformerConfig
from model.loss import linear_cross_entropy, linear_cross_entropy_reference
from model.stage import build_stage

MIB = 2**20


def test_memory_is_counted_to_the_byte():
    def work() -> torch.Tensor:
        kept = torch.zeros(3, MIB, dtype=torch.uint8)
        torch.zeros(4, MIB, dtype=torch.uint8)
        torch.zeros(5, MIB, dtype=torch.uint8)
        return kept

    memory = measure(work)
    assert memory.held == 3 * MIB
    assert memory.peak == 8 * MIB


def loss_peak(loss_of) -> float:
    """Bytes of forward and backward, as a multiple of the hidden states."""
    rows, dim, codes = 16_384, 256, 256
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    heads = torch.randn(3, codes, dim, dtype=torch.bfloat16, requires_grad=True)
    predicting = torch.randperm(rows)[: 3 * (rows // 3)].view(3, -1)
    targets = torch.randint(codes, predicting.shape)
    memory = measure(lambda: loss_of(hidden, heads, predicting, targets).mean().backward())
    return memory.peak / (hidden.numel() * hidden.element_size())


def test_the_fused_loss_takes_little_beside_the_gradient_of_the_hidden_states(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 1)  # what it would be for a few thousand steps more
    assert loss_peak(linear_cross_entropy) < 1.3  # 1.0 is that gradient
    assert loss_peak(linear_cross_entropy_reference) > 5


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_recomputation_holds_less_between_forward_and_backward(kv_heads):
    held = {}
    for recompute in ("none", "selective", "block"):
        torch.manual_seed(0)
        shape = TransformerConfig(dim=64, layers=4, heads=2, kv_heads=kv_heads)
        stage = build_stage(coarse_config(transformer=shape), FIELDS, quantizers())
        stage.configure(ExecutionConfig(recompute=recompute))
        batch = random_batch()
        stage(batch)  # tables that are made once
        held[recompute] = measure(lambda stage=stage, batch=batch: stage(batch)).held
    assert held["block"] < 0.5 * held["selective"]
    assert held["selective"] < 0.75 * held["none"]
