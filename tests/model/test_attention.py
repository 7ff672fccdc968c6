"""Every attention backend that can run here against the definition, in fp64."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from model import attention
from model.attention import Packing, choose, math, sdpa
from model.errors import UserError

SHAPES = {
    "whole window": (7, 7, 4),
    "one more step": (1, 7, 4),
    "several more steps": (3, 7, 4),
    "grouped queries": (7, 7, 2),
    "one more step, grouped queries": (1, 7, 1),
}


def tensors(queries, keys, kv_heads, heads=4, batch=2):
    torch.manual_seed(0)
    shapes = [(batch, heads, queries, 8), (batch, kv_heads, keys, 8), (batch, kv_heads, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_hand(q, k, v):
    """One query at a time: the last of the queries sees the last of the keys."""
    rows = []
    for query in range(q.shape[2]):
        seen = k.shape[2] - q.shape[2] + query + 1
        heads = []
        for head in range(q.shape[1]):
            source = head * k.shape[1] // q.shape[1]
            scores = (k[:, source, :seen] @ q[:, head, query, :, None])[..., 0] / q.shape[-1] ** 0.5
            heads.append((scores.softmax(-1)[..., None] * v[:, source, :seen]).sum(1))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("attend", [math, sdpa])
def test_a_backend_is_the_definition(attend, shape):
    inputs = tensors(*shape)
    got, expected = attend(*inputs, None), by_hand(*inputs)
    assert torch.allclose(got, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("attend", [math, sdpa])
def test_packed_windows_do_not_see_each_other(attend):
    inputs = tensors(9, 9, 2, batch=1)
    packing = Packing((4, 1, 4))
    apart = [by_hand(*part) for part in zip(*(x.split([4, 1, 4], dim=2) for x in inputs), strict=True)]
    assert torch.allclose(attend(*inputs, packing), torch.cat(apart, dim=2), atol=1e-12)


def test_on_a_cpu_auto_is_sdpa_and_says_so_once(caplog):
    attention._best.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert choose("auto", torch.device("cpu"), torch.float32, 64) == ("sdpa", sdpa)
    assert [record.getMessage() for record in caplog.records] == ["attention: sdpa"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "no attention backend 'flash': choose one of auto, math, sdpa, flash2, flash3, flash4"),
        ("flash2", "'flash2' cannot be used here: it needs a GPU, and the model is on the cpu. Set attention to auto"),
        ("flash4", "it needs a GPU"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused_in_words(name, message):
    with pytest.raises(UserError, match=message):
        choose(name, torch.device("cpu"), torch.float32, 64)


def test_a_backend_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "randn", lambda *shape, **settings: torch.zeros(shape, requires_grad=True))
    with pytest.raises(UserError, match="the package flash-attn is not installed"):
        choose("flash2", torch.device("cuda"), torch.bfloat16, 64)
