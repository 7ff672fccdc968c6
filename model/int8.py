"""Weights of linear layers in 8 bits: a quarter of fp32's size in a file.

Each row of a weight, which makes one output channel, is scaled so that its largest magnitude is 127, and rounded.
Weights become numbers of more bits again when they are loaded: torch's products with weights that stay int8 are slower
on a CPU than with all but a row or two at a time, and crash on some shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

LARGEST = 127
WEIGHT = "weight"
SCALE = "scale"
"""What the last part of a weight's name becomes in that of its scales `[rows]`."""


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of a stage is the weight of a linear layer of its transformer: those are rounded. Embeddings,
    heads, norms and the conditions' own layers are not."""
    return name.startswith("transformer.") and len(shape) == 2


def quantised(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for `weight` `[rows, columns]`: int8 under its own name, and the fp32 scales `[rows]`."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    yield name, (weight / scale[:, None]).round().to(torch.int8)
    yield _scale_name(name), scale


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with every weight of 8 bits in fp32, as it was but for the rounding."""
    found = {name: tensors[_scale_name(name)] for name in tensors if _scale_name(name) in tensors}
    scales = {_scale_name(name) for name in found}
    return {
        name: value.float() * found[name][:, None] if name in found else value
        for name, value in tensors.items()
        if name not in scales
    }


def _scale_name(name: str) -> str:
    return name.removesuffix(WEIGHT) + SCALE
