"""How weights start and are stepped, and that with μP neither has to change with the width."""

from __future__ import annotations

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from model.config import TransformerConfig
from model.initialisation import parameter_groups
from model.stage import build_stage


def build(**transformer):
    torch.manual_seed(0)
    config = TransformerConfig(**{"dim": 64, "layers": 2, "heads": 2, **transformer})
    return build_stage(coarse_config(transformer=config), FIELDS, quantizers())


def std(stage, name):
    return dict(stage.named_parameters())[name].std().item()


def test_what_writes_into_the_residual_stream_starts_smaller_by_depth():
    written, read = "transformer.blocks.1.feed_forward.down.weight", "transformer.blocks.1.feed_forward.up.weight"
    deep, plain = build(layers=8), build(layers=8, residual_init="plain")
    assert std(deep, read) == pytest.approx(0.02, rel=0.05)
    assert std(deep, written) == pytest.approx(0.02 / 4, rel=0.05)
    assert std(plain, written) == pytest.approx(0.02, rel=0.05)


def test_matrices_decay_and_embeddings_norms_and_nulls_do_not():
    stage = build()
    groups = parameter_groups(stage, stage.config.transformer, 1e-3, 0.1)
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    decay = {names[id(member)]: group["weight_decay"] for group in groups for member in group["params"]}
    assert set(decay) == set(names.values())
    assert {name for name, value in decay.items() if value == 0} == {
        name for name in decay if "norm" in name or name == "embedding.weight" or name.endswith("sum_null")
    }
    assert {group["lr"] for group in groups} == {1e-3}


def test_mup_scales_starts_and_rates_of_wide_matrices_alone():
    base, wide = build(mup_base_dim=64), build(dim=256, heads=8, mup_base_dim=64)
    ratio = {name: std(wide, name) / std(base, name) for name, value in base.named_parameters() if value.dim() > 1}
    assert ratio["embedding.weight"] == pytest.approx(1, rel=0.05)
    assert ratio["heads"] == pytest.approx(1 / 4, rel=0.05)
    assert ratio["transformer.blocks.0.attention.q.weight"] == pytest.approx(1 / 2, rel=0.05)
    assert ratio["conditions.0.sum_in.weight"] == pytest.approx(1, rel=0.05)
    rates = {}
    for group in parameter_groups(wide, wide.config.transformer, 1e-3, 0.1):
        for name, parameter in wide.named_parameters():
            if any(parameter is member for member in group["params"]):
                rates[name] = group["lr"], group["lr"] * group["weight_decay"]
    assert rates["heads"] == pytest.approx((2.5e-4, 1e-4))
    assert rates["embedding.weight"] == (1e-3, 0)
    assert rates["conditions.0.sum_in.weight"] == pytest.approx((1e-3, 1e-4))


@pytest.mark.parametrize("mup", [True, False])
def test_with_mup_a_step_moves_the_logits_alike_at_every_width(mup):
    """The coordinate check of Yang et al. 2022: how far a few steps of Adam move the logits."""
    moved = []
    for dim in (64, 512):
        stage = build(dim=dim, heads=dim // 32, mup_base_dim=64 if mup else None, qk_norm=False)
        batch = random_batch(batch=2)
        before = stage.logits(batch).detach()
        optimizer = torch.optim.AdamW(parameter_groups(stage, stage.config.transformer, 1e-2, 0.0))
        for _ in range(3):
            optimizer.zero_grad()
            stage(batch).mean().backward()
            optimizer.step()
        moved.append((stage.logits(batch).detach() - before).std().item())
    growth = moved[1] / moved[0]
    assert growth < 1.7 if mup else growth > 2.5, growth
