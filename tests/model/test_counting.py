"""The formulas of model.counting against the modules they describe."""

from __future__ import annotations

import pytest
import torch
from helpers import CENTROID_DIM, FIELDS, coarse_config, fine_config, random_batch
from torch.utils.flop_counter import FlopCounterMode

from model.config import (
    ConditionConfig,
    ExecutionConfig,
    KMeansConfig,
    QuantizersConfig,
    StageModelConfig,
    TransformerConfig,
)
from model.config import EncodersConfig as Encoders
from model.counting import activation_bytes, count_stage, token_fields
from model.fields import CONDITIONING, SEMANTIC
from model.stage import StageTransformer

DIMS = {CONDITIONING: CENTROID_DIM, SEMANTIC: CENTROID_DIM}
CONFIGS = {
    "every path": coarse_config(),
    "delay": coarse_config(pattern="delay"),
    "fine": fine_config(),
    "grouped queries": coarse_config(
        transformer=TransformerConfig(dim=64, layers=2, heads=4, kv_heads=2, qk_norm=False)
    ),
    "own width": coarse_config(transformer=TransformerConfig(dim=64, layers=1, heads=2, ffn_dim=100)),
    "summed only": coarse_config(conditions=[ConditionConfig(field=SEMANTIC, paths=["summed"])]),
    "nothing given": coarse_config(conditions=[]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_and_positions_are_those_of_the_module(config: StageModelConfig) -> None:
    count = count_stage(config, FIELDS, DIMS)
    model = StageTransformer(config, FIELDS, DIMS)
    assert count.parameters == sum(parameter.numel() for parameter in model.parameters())
    steps = []
    model.transformer.register_forward_hook(lambda module, inputs, output: steps.append(output.shape[1]))
    batch = random_batch()
    model.logits(batch)
    assert steps == [count.positions]
    assert count.tokens == batch[config.field][0, :, model.quantizers.start : model.quantizers.stop].numel()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_matrix_flops_are_those_that_torch_counts(config: StageModelConfig) -> None:
    model = StageTransformer(config, FIELDS, DIMS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(random_batch(batch=1))
    products = {
        operation: flops for operation, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(operation)
    }
    assert count_stage(config, FIELDS, DIMS).matmul_flops == sum(products.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_attention_flops_are_the_causal_half_of_what_torch_counts(config: StageModelConfig) -> None:
    model = StageTransformer(config, FIELDS, DIMS)
    model.configure(ExecutionConfig(attention="math"))  # two plain products, which compute the masked half too
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(random_batch(batch=1))
    count = count_stage(config, FIELDS, DIMS)
    whole = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert count.attention_flops == whole * (count.positions + 1) // (2 * count.positions)


def test_training_costs_three_forward_passes() -> None:
    config = coarse_config(transformer=TransformerConfig(dim=256, layers=4, heads=2))
    model = StageTransformer(config, FIELDS, DIMS)
    with FlopCounterMode(display=False) as counter:
        model(random_batch(batch=1)).mean().backward()
    products = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    # The loss makes its logits twice.
    assert products == pytest.approx(3 * count_stage(config, FIELDS, DIMS).matmul_flops, rel=0.02)


def test_activations_are_at_most_what_autograd_keeps_on_a_cpu() -> None:
    # Without fused norms a CPU keeps more, in fp32: the estimate must lie below, and not far.
    config = coarse_config(transformer=TransformerConfig(dim=64, layers=4, heads=1))
    model = StageTransformer(config, FIELDS, DIMS).bfloat16()
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(random_batch(batch=1))
    measured = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert 0.4 * measured < activation_bytes(config, FIELDS) < measured


def test_the_feed_forward_width_is_eight_thirds_in_multiples_of_64() -> None:
    from model.counting import ffn_width

    assert [ffn_width(TransformerConfig(dim=dim, heads=2)) for dim in (192, 256, 1024)] == [512, 704, 2752]


def test_fields_come_from_encoders_and_quantizers() -> None:
    quantizers = QuantizersConfig(conditioning=KMeansConfig(levels=12, codebook_size=1024))
    fields = token_fields(Encoders(), quantizers)
    assert (fields["conditioning"].quantizers, fields["conditioning"].codebook_size) == (12, 1024)
    assert (fields["conditioning"].rate_hz, fields["semantic"].rate_hz, fields["acoustic"].rate_hz) == (0.2, 25, 25)
