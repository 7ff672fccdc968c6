"""What a checkpoint of `transformers` says of a stage beside its weights: its shape, its ids and its clock."""

from __future__ import annotations

from math import ceil, isclose
from typing import Any

import torch
from torch import Tensor

from model.conditions import Condition
from model.config import SamplingConfig, StageName
from model.counting import ffn_width
from model.fields import CONDITIONING, TokenField
from model.stage import START_ID, Batch, StageTransformer
from model.transformer import EPSILON

FORMAT_VERSION = 1
"""Of the block; it goes up when what it says can no longer be read as before."""
BLOCK = "stretto"
"""The block of config.json that says what the ids mean."""
MODELLING = "modeling_stretto"
"""The module that goes along where no stock model computes the same."""
NOT_SHAPE = {"max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "auto_map"}
"""Settings of config.json that do not change what is computed."""


def is_stock(stage: StageTransformer) -> bool:
    """Whether a stock Llama or Qwen3 computes the same: it takes one id a step, adds nothing to it, and its positions
    are evenly spaced."""
    pattern = stage.pattern(window_frames(stage))
    if pattern.stride < pattern.quantizers or any(set(part.paths) != {"prefix"} for part in stage.conditions):
        return False
    positions = stage.positions(some_window(stage, pattern.frames), pattern)
    step = 1 / position_scale(stage)
    return all(isclose(at, positions[0] + i * step, abs_tol=1e-6) for i, at in enumerate(positions))


def position_scale(stage: StageTransformer) -> int:
    """Steps of the stream for every whole position: a stock model divides its positions by it."""
    return 1 if stage.config.positions == "index" else stage.pattern(1).stride


def window_frames(stage: StageTransformer) -> int:
    """Frames of the target in a whole window."""
    return stage.target.frames(stage.config.window_seconds)


def frames_beside(field: TokenField, target: TokenField, frames: int) -> int:
    """Frames of a condition's `field` beside so many of the target."""
    return 1 if field.name == CONDITIONING else ceil(frames * field.rate / target.rate)


def some_window(stage: StageTransformer, frames: int, rows: int = 1, generator: torch.Generator | None = None) -> Batch:
    """Codes of every field that the stage reads or writes, drawn evenly, for a window of `frames` frames."""

    def codes(field: TokenField) -> Tensor:
        shape = rows, frames_beside(field, stage.target, frames), field.quantizers
        return torch.randint(field.codebook_size, shape, generator=generator)

    return {field.name: codes(field) for field in [stage.target, *(part.field for part in stage.conditions)]}


def id_map(stage: StageTransformer, name: StageName) -> dict[str, Any]:
    """The block of `config.json` that says what the ids mean (docs/transformers.md lists its keys)."""
    config, frames = stage.config, window_frames(stage)
    return {
        "format_version": FORMAT_VERSION,
        "stage": name,
        "window_seconds": config.window_seconds,
        "frames": frames,
        "pattern": config.pattern,
        "stride": stage.pattern(frames).stride,
        "positions": config.positions,
        "start_id": START_ID,
        "mask_id": stage.mask_id if config.forgetful_masking else None,
        "predicts": _ids(stage.target, stage.quantizers, stage.offsets),
        "conditions": [_condition(stage, part) for part in stage.conditions],
    }


def _ids(field: TokenField, quantizers: range, first_ids: list[int]) -> dict[str, Any]:
    return {
        "field": field.name,
        "rate_hz": field.rate_hz,
        "codebook_size": field.codebook_size,
        "first_quantizer": quantizers.start,
        "quantizers": len(quantizers),
        "first_ids": first_ids,
    }


def _condition(stage: StageTransformer, part: Condition) -> dict[str, Any]:
    ratio = part.field.rate / stage.target.rate
    embedded = {"prefix", "aligned"} & set(part.paths)
    return {
        **_ids(part.field, part.quantizers, part.offsets if embedded else []),
        "paths": list(part.paths),
        "null_id": part.null_id,
        "whole_window": part.field.name == CONDITIONING,
        "frames_per_target_frame": [ratio.numerator, ratio.denominator],
        "centroid_dim": part.centroids.shape[-1] if "summed" in part.paths else None,
    }


def backbone(stage: StageTransformer) -> dict[str, Any]:
    """The settings of the Llama or Qwen3 that computes the stage's blocks."""
    transformer, stock = stage.config.transformer, is_stock(stage)
    pattern = stage.pattern(window_frames(stage))
    scaled = stock and position_scale(stage) > 1
    return {
        "model_type": "qwen3" if transformer.qk_norm else "llama",
        "vocab_size": stage.embedding.num_embeddings,
        "hidden_size": transformer.dim,
        "intermediate_size": ffn_width(transformer),
        "num_hidden_layers": transformer.layers,
        "num_attention_heads": transformer.heads,
        "num_key_value_heads": transformer.kv_heads or transformer.heads,
        "head_dim": transformer.dim // transformer.heads,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "rope_theta": transformer.rope_theta,
        "rope_scaling": {"rope_type": "linear", "factor": float(position_scale(stage))} if scaled else None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **({"use_sliding_window": False} if transformer.qk_norm else {"mlp_bias": False}),
        "max_position_embeddings": len(stage.positions(some_window(stage, pattern.frames), pattern)),
        "bos_token_id": START_ID,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def config_json(stage: StageTransformer, name: StageName) -> dict[str, Any]:
    """`config.json` of the checkpoint."""
    settings = backbone(stage)
    common = {"dtype": "float32", BLOCK: id_map(stage, name)}
    if is_stock(stage):
        architecture = "Qwen3ForCausalLM" if stage.config.transformer.qk_norm else "LlamaForCausalLM"
        return {"architectures": [architecture], **settings, **common}
    auto_map = {"AutoConfig": f"{MODELLING}.StrettoConfig", "AutoModelForCausalLM": f"{MODELLING}.StrettoStage"}
    return {
        "architectures": ["StrettoStage"],
        "model_type": "stretto_stage",
        "auto_map": auto_map,
        "tie_word_embeddings": False,
        "text_config": settings,
        **common,
    }


def generation_json(stage: StageTransformer, name: StageName, sampling: SamplingConfig) -> dict[str, Any]:
    """`generation_config.json`: a whole window, drawn as the bundle says."""
    temperature = sampling.temperature.get(name, 1.0)
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:  # transformers would draw from the likeliest 50 if nothing were said
        top_k, top_p = sampling.top_k.get(name, 0), sampling.top_p.get(name, 1.0)
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if is_stock(stage):
        return {**settings, "bos_token_id": START_ID, "max_new_tokens": window_frames(stage) * len(stage.quantizers)}
    return {**settings, "guidance_scale": sampling.cfg.get(name, 1.0)}
