"""Linear layers for sampling on a CPU, their weights laid out once as oneDNN's products want them.

A step multiplies a few rows by every weight of the model, for which torch's usual layout is slower in bf16. In fp32
torch's plain product takes other algorithms, with other rounding, for other numbers of rows: a clip would depend on its
batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.stage import StageTransformer


class PrepackedLinear(nn.Module):
    """`F.linear(x, weight)` whose rows come out the same however many there are."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        with torch.inference_mode():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] and x.dtype == torch.float32:  # a single row would go by a path of its own
            return self._product(torch.cat([x, x]))[:1]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")  # type: ignore[no-any-return]


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with `weight` that suits its device and type."""
    return PrepackedLinear(weight) if _can_prepack(weight) else partial(F.linear, weight=weight)


def prepacked(stage: StageTransformer) -> StageTransformer:
    """`stage` for sampling: the same on a GPU, and on a CPU one that shares its tensors but has prepacked layers."""
    if not _can_prepack(stage.heads):
        return stage
    twin = copy.deepcopy(stage, {id(tensor): tensor for tensor in (*stage.parameters(), *stage.buffers())})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PrepackedLinear(child.weight))
    return twin


def _can_prepack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
