"""Keys and values of the steps so far: what lets sampling look at each step once.

Shapes are named by letters: B batch, H heads, K key/value heads, S new steps, T steps in all, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attend
from model.config import TransformerConfig


def attend_from_one(q_BH1E: Tensor, keys_BKTE: Tensor, values_BKTE: Tensor) -> Tensor:
    """Attention of one query to all keys, as two products: torch's kernel for a CPU is made for many queries."""
    batch, kv_heads, _, width = keys_BKTE.shape
    q_BKGE = q_BH1E.to(keys_BKTE.dtype).view(batch, kv_heads, -1, width)
    weights_BKGT = (q_BKGE @ keys_BKTE.transpose(-1, -2) * width**-0.5).softmax(dim=-1)
    return (weights_BKGT @ values_BKTE).view(q_BH1E.shape).to(q_BH1E.dtype)


class LayerCache:
    """Keys and values of one layer for a fixed number of steps, filled from the left."""

    def __init__(self, keys_BKTE: Tensor, values_BKTE: Tensor) -> None:
        self.keys, self.values = keys_BKTE, values_BKTE
        self.length = 0

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new keys and values and attends from the new steps to all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        if start == 0:
            return attend(q, k, v, None)
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        if q.shape[2] == 1 and not q.is_cuda:
            return attend_from_one(q, keys, values)
        return attend(q.to(keys.dtype), keys, values, None).to(q.dtype)


class GraphLayerCache(LayerCache):
    """One that takes one step at a time, at a place that is a tensor: no shape and no number of Python changes, so that
    a CUDA graph can replay the step. Every step looks over all places and masks those still empty.
    """

    def __init__(self, filled: LayerCache, place: Tensor) -> None:
        super().__init__(filled.keys, filled.values)
        self.place = place
        """int64 `[1]`, shared by all layers; whoever replays the step moves it on."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.index_copy_(2, self.place, k)
        self.values.index_copy_(2, self.place, v)
        seen = torch.arange(self.keys.shape[2], device=q.device) <= self.place
        return F.scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=seen[None], enable_gqa=q.shape[1] != self.keys.shape[1]
        )


def new_cache(
    config: TransformerConfig, batch: int, steps: int, device: torch.device, dtype: torch.dtype
) -> list[LayerCache]:
    """An empty cache for each layer, on a CPU in fp32 at least: there products of one query are slower in bf16."""
    if device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    shape = (2, batch, config.kv_heads or config.heads, steps, config.dim // config.heads)
    return [LayerCache(*torch.zeros(shape, device=device, dtype=dtype)) for _ in range(config.layers)]
