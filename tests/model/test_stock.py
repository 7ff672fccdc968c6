"""The blocks are those of stock models in `transformers`: Llama, and with q/k norm Qwen3."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from model.config import TransformerConfig
from model.transformer import Transformer, rotary_tables

NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def stock_name(name: str) -> str:
    if name == "norm.weight":
        return name
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"layers.{layer}.{NAMES[part]}.weight"


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("qk_norm", "kind", "settings"), [(False, LlamaModel, LlamaConfig), (True, Qwen3Model, Qwen3Config)]
)
def test_hidden_states_are_those_of_a_stock_model(qk_norm, kind, settings, kv_heads):
    torch.manual_seed(0)
    config = TransformerConfig(dim=64, layers=3, heads=4, kv_heads=kv_heads, qk_norm=qk_norm, rope_theta=5_000.0)
    ours = Transformer(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    stock = kind(
        settings(
            vocab_size=1,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=16,
            rms_norm_eps=1e-6,
            rope_theta=5_000.0,
        )
    ).eval()
    weights = {stock_name(name): value for name, value in ours.state_dict().items()}
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    x = torch.randn(2, 21, 64)
    rotary = rotary_tables(tuple(map(float, range(21))), 16, 5_000.0, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = stock(inputs_embeds=x).last_hidden_state
        assert (ours(x, rotary) - expected).abs().max() < 1e-4
