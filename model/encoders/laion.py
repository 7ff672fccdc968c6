"""LAION's own CLAP checkpoints (laion-clap's `.pt` files) in transformers' ClapModel: the embeddings are the same."""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import JointEmbedderConfig
from model.encoders.checkpoint import fill, read_tensors
from model.encoders.pretrained import TOKENIZERS, find_tokenizer, weights_key
from model.errors import UserError

# LAION's names → transformers'.
RENAMED = (
    (r"^module\.", ""),
    (r"^text_branch\.", "text_model."),
    (r"^audio_branch\.bn0\.", "audio_model.audio_encoder.batch_norm."),
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"(blocks\.\d+)\.attn\.", r"\1.attention.self."),
    (r"(blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^(text|audio)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(text|audio)_projection\.2\.", r"\1_projection.linear2."),
)
AUDIO, TEXT = "audio_model.audio_encoder.", "text_model."
TEXT_HEAD_WIDTH = 64
LONGEST_TEXT = 77
"""Tokens of a text that LAION's CLAP was trained on."""


def load_laion(config: JointEmbedderConfig, file: Path) -> tuple[Any, Any, Any]:
    """The model, the feature extractor and the tokenizer for the checkpoint `file`.

    The architecture is read from the shapes (HTSAT-tiny of `630k-*`, HTSAT-base of `music_*`). Raises UserError for a
    file that is no such checkpoint or one with fusion, and where the tokenizer's files are missing.
    """
    from transformers import ClapFeatureExtractor, ClapModel, RobertaTokenizerFast

    folder = find_tokenizer(config, file)
    try:
        tokenizer = RobertaTokenizerFast.from_pretrained(folder, local_files_only=True, model_max_length=LONGEST_TEXT)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"encoders.joint.tokenizer: the one in {folder} does not load: {reason}") from None
    tensors = _renamed(read_tensors("clap", file))
    found = _architecture(tensors, file)
    if len(tokenizer) != found.text_config.vocab_size:
        raise UserError(
            f"encoders.joint.tokenizer: the one in {folder} has {len(tokenizer)} words, but {file.name} has "
            f"{found.text_config.vocab_size}: it wants the tokenizer of {TOKENIZERS[0]}."
        )
    model = fill(ClapModel(found), tensors, "clap", file)
    return model, ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc"), tokenizer


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = third
        else:
            found[name] = value
    return found


def _architecture(tensors: dict[str, Tensor], file: Path) -> Any:
    """The ClapConfig with the shapes of `tensors`."""
    from transformers import ClapConfig

    if any(".fusion_model." in name or ".mel_conv2d." in name for name in tensors):
        raise UserError(f"{weights_key('clap')}: {file} is CLAP with fusion, which is not supported: choose another.")
    try:
        width = tensors[f"{AUDIO}patch_embed.proj.weight"].shape[0]
        words, hidden = tensors[f"{TEXT}embeddings.word_embeddings.weight"].shape
        biases = [f"{AUDIO}layers.{layer}.blocks.0.attention.self.relative_position_bias_table" for layer in range(4)]
        table, _ = tensors[biases[0]].shape
        audio = {
            "patch_embeds_hidden_size": width,
            "hidden_size": 8 * width,
            "depths": [_count(tensors, rf"{AUDIO}layers\.{layer}\.blocks\.(\d+)\.") for layer in range(4)],
            "num_attention_heads": [tensors[name].shape[1] for name in biases],
            "window_size": (isqrt(table) + 1) // 2,
            "num_mel_bins": len(tensors[f"{AUDIO}batch_norm.weight"]),
            "enable_fusion": False,
        }
        text = {
            "vocab_size": words,
            "hidden_size": hidden,
            "num_hidden_layers": _count(tensors, rf"{TEXT}encoder\.layer\.(\d+)\."),
            "num_attention_heads": hidden // TEXT_HEAD_WIDTH,
            "intermediate_size": len(tensors[f"{TEXT}encoder.layer.0.intermediate.dense.weight"]),
            "max_position_embeddings": len(tensors[f"{TEXT}embeddings.position_embeddings.weight"]),
        }
        dim = len(tensors["audio_projection.linear2.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{weights_key('clap')}: {file} is no CLAP of LAION with HTSAT and RoBERTa (no {error})."
        ) from None
    own = {"projection_dim": dim}
    return ClapConfig(audio_config={**audio, **own}, text_config={**text, **own}, projection_dim=dim)


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))
