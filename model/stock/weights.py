"""A stage's weights under the names of `transformers`, and back; files of safetensors, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.errors import UserError
from model.saving import system_errors
from model.stage import StageTransformer
from model.stock.layout import is_stock

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = "5GB"
"""The largest file; above it, weights are several files with an index."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PARTS = {
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
"""Our name of a part of a block → that of Llama and Qwen3."""


def stock_name(name: str) -> str:
    """What one of a stage's weights is called in a checkpoint; heads and conditions keep their names."""
    if name == "embedding.weight":
        return "model.embed_tokens.weight"
    if name.startswith("transformer.blocks."):
        layer, part = name.removeprefix("transformer.blocks.").removesuffix(".weight").split(".", 1)
        return f"model.layers.{layer}.{PARTS[part]}.weight"
    return name.replace("transformer.norm.", "model.norm.")


def to_tensors(stage: StageTransformer) -> dict[str, Tensor]:
    """The tensors of the checkpoint: the stage's weights, and the centroids of its summed conditions, which a bundle
    keeps with its quantizers. A stock model has one head over all ids, with zeros for those that are not predicted."""
    tensors = {stock_name(name): value for name, value in stage.state_dict().items()}
    for number, part in enumerate(stage.conditions):
        if "summed" in part.paths:
            tensors[f"conditions.{number}.centroids"] = part.centroids
    if is_stock(stage):
        heads = tensors.pop("heads")
        tensors["lm_head.weight"] = rows = torch.zeros_like(stage.embedding.weight)
        for head, first in zip(heads, stage.offsets, strict=True):
            rows[first : first + len(head)] = head
    return tensors


def from_tensors(stage: StageTransformer, tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The stage's state dict, in fp32, of the tensors of a checkpoint at `where`.

    Raises UserError for tensors that are missing, too many, of another shape or not finite, and for centroids that are
    not those of the stage's quantizers.
    """
    expected = to_tensors(stage)
    _check_names(expected, tensors, where)
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(value.shape)}; the bundle's stage has {list(expected[name].shape)}."
            )
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are no finite numbers: its training diverged.")
        if name.endswith(".centroids") and not torch.equal(value, expected[name].to(value.dtype)):
            raise UserError(f"{where}: {name} are not those of the bundle's quantizers: its codes mean something else.")
    state = {name: tensors[stock_name(name)].float() for name in stage.state_dict() if stock_name(name) in tensors}
    if is_stock(stage):
        rows, size = tensors["lm_head.weight"].float(), stage.target.codebook_size
        state["heads"] = torch.stack([rows[first : first + size] for first in stage.offsets])
    return state


def _check_names(expected: dict[str, Tensor], found: dict[str, Tensor], where: Path) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise UserError(f"{where} has no {missing[0]}, one of {len(missing)} tensors that the stage needs.")
    if unknown:
        raise UserError(
            f"{where} holds {unknown[0]}, one of {len(unknown)} tensors that the stage does not have. Merge adapters "
            "into the weights first."
        )


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes them as transformers does: one file, or several with an index."""
    with system_errors(folder):
        save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint. Raises UserError where a file is missing, cut short or a pickle."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut short ({error}): copy it again.") from None
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors. Raises UserError where one is missing or a pickle."""
    files = [folder / name for name in _names(folder)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: copy the whole folder again.")
    return files


def _names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX} is damaged: it does not read as an index of weights.") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX} names {name}: only safetensors files beside it are read.")
        return names
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles and not (folder / SINGLE).is_file():
        raise UserError(
            f"{folder} holds {pickles[0]} and no {SINGLE}. It is a pickle, which can run code when it is opened, so it "
            "is not read.\nSave the model again with save_pretrained(..., safe_serialization=True)."
        )
    return [SINGLE]
