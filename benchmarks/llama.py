"""Llama in `transformers`, shaped like a stage of a recipe: what the speed of ours is compared with."""

from __future__ import annotations

import torch
from stages import DTYPES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.recipe import Recipe
from model.counting import TRAINING_FACTOR, StageCount, block_matrices, embedding_rows, ffn_width, token_fields


def llama_config(recipe: Recipe, count: StageCount) -> LlamaConfig:
    """The shape of the coarse stage over one flat vocabulary: every code of every quantizer it reads or writes."""
    config = recipe.stages.coarse.model
    special = 1 + len(config.conditions)  # ours has rows for a start and for absent conditions
    shape = config.transformer
    return LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=ffn_width(shape),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=embedding_rows(config, token_fields(recipe.encoders, recipe.quantizers)) - special,
        max_position_embeddings=count.positions,
        rope_theta=shape.rope_theta,
        attn_implementation="sdpa",
    )


def new_llama(recipe: Recipe, count: StageCount, dtype: str, device: str) -> LlamaForCausalLM:
    """With random parameters of `dtype`."""
    with torch.device(device):
        return LlamaForCausalLM(llama_config(recipe, count)).to(DTYPES[dtype])


def random_text(model: LlamaForCausalLM, count: StageCount, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and labels `[batch, positions]`; as ours, it is not asked for the conditions."""
    ids = torch.randint(model.config.vocab_size, (batch, count.positions), device=device)
    labels = ids.clone()
    labels[:, : count.prefix] = -100
    return ids, labels


def training_flops(recipe: Recipe, model: LlamaForCausalLM, count: StageCount) -> int:
    """Forward and backward of one window, counted as `model.counting` does; its head looks at every position."""
    shape = recipe.stages.coarse.model.transformer
    matrices = shape.layers * block_matrices(shape) + model.config.vocab_size * shape.dim
    return TRAINING_FACTOR * (2 * count.positions * matrices + count.attention_flops)
