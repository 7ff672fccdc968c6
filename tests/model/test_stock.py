"""The blocks are those of stock models in `transformers`: Llama, and with q/k norm Qwen3."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from model.config import TransformerConfig
from model.stock.weights import stock_name
from model.transformer import Transformer, rotary_tables


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
    names = {name: stock_name(f"transformer.{name}").removeprefix("model.") for name in ours.state_dict()}
    weights = {names[name]: value for name, value in ours.state_dict().items()}
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    x = torch.randn(2, 21, 64)
    rotary = rotary_tables(tuple(map(float, range(21))), 16, 5_000.0, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = stock(inputs_embeds=x).last_hidden_state
        assert (ours(x, rotary) - expected).abs().max() < 1e-4
