"""Keys and values of the steps so far: what lets sampling look at each step once.

Shapes are named by letters: B batch, H heads, K key/value heads, S new steps, T steps in all, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attend
from model.config import TransformerConfig


class LayerCache:
    """Keys and values of one layer for a fixed number of steps, filled from the left."""

    def __init__(self, keys_BKTE: Tensor, values_BKTE: Tensor) -> None:
        self.keys, self.values = keys_BKTE, values_BKTE
        self.length = 0

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new keys and values and attends from the new steps to all so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return attend(q, self.keys[:, :, :end], self.values[:, :, :end], None)


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
    """An empty cache for each layer."""
    shape = (2, batch, config.kv_heads or config.heads, steps, config.dim // config.heads)
    return [LayerCache(*torch.zeros(shape, device=device, dtype=dtype)) for _ in range(config.layers)]
