"""The choice between torch's kernels and Liger's; what Liger's compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from model import kernels
from model.config import ExecutionConfig, TransformerConfig
from model.errors import UserError
from model.kernels import TORCH, Kernels, choose
from model.stage import build_stage

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYERS = 3


@pytest.fixture
def counting(monkeypatch) -> Counter:
    """Lets torch's kernels, which count their calls, stand in for Liger's on this machine."""
    calls: Counter = Counter()

    def counted(name: str):
        def call(*arguments):
            calls[name] += 1
            return getattr(TORCH, name)(*arguments)

        return call

    parts = ("rms_norm", "rotate", "swiglu")
    monkeypatch.setattr(kernels, "_liger", lambda: Kernels("liger", *(counted(name) for name in parts)))
    monkeypatch.setattr(kernels, "_obstacle", lambda device, compiled: None)
    return calls


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_stage_computes_with_the_kernels_it_is_told_to(counting, qk_norm):
    shape = TransformerConfig(dim=64, layers=LAYERS, heads=2, qk_norm=qk_norm)
    torch.manual_seed(0)
    stage, batch = build_stage(coarse_config(transformer=shape), FIELDS, quantizers()), random_batch()
    expected = stage(batch)
    assert not counting
    stage.configure(ExecutionConfig(kernels="liger"))
    assert torch.equal(stage(batch), expected)
    # Liger's writes where it reads: only what a norm has just made is given to it.
    turned = {"rotate": LAYERS} if qk_norm else {}
    assert counting == {"rms_norm": LAYERS * (4 if qk_norm else 2) + 1, "swiglu": LAYERS, **turned}
    counting.clear()
    stage.configure(ExecutionConfig(kernels="torch"))
    assert torch.equal(stage(batch), expected)
    assert not counting


def test_what_keeps_liger_from_being_used_is_said_in_words(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    for device, compiled, message in (
        (CPU, False, "'liger' cannot be used here: they need a GPU, and the model is on the cpu. Set kernels to torch"),
        (GPU, True, "the blocks are compiled, which fuses the same by itself"),
        (GPU, False, "the package liger-kernel is not installed"),
    ):
        with pytest.raises(UserError, match=message):
            choose("liger", device, compiled)
        assert choose("torch", device, compiled) is TORCH
