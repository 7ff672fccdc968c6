"""A Llama-shaped decoder: pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

Shapes are named by letters: B batch, S steps, D model width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TransformerConfig
from model.counting import ffn_width


class Cache:
    """Keys and values of every layer for a fixed number of steps, filled from the left."""

    def __init__(self, config: TransformerConfig, batch: int, steps: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, batch, config.kv_heads or config.heads, steps, config.dim // config.heads)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys_BKSE: Tensor, values_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new steps of one layer and returns that layer's keys and values so far."""
        end = self.length + keys_BKSE.shape[2]
        self.keys[layer, :, :, self.length : end] = keys_BKSE
        self.values[layer, :, :, self.length : end] = values_BKSE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Rotary:
    """Rotary position tables (Su et al. 2021) for real-valued positions.

    Not a module: casting the model to bf16 must not touch them, since bf16 cannot tell position 257 from 258.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def tables(self, positions_S: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[S, E]` of the angles of `positions_S`."""
        angles = positions_S.double()[:, None] * self.frequencies.to(positions_S.device)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turns each pair (i, i + E/2) of a head by its angle: the layout of Llama in `transformers`."""
    left, right = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos_SE + torch.cat([-right, left], dim=-1) * sin_SE


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.dim // config.heads
        self.q = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        batch, steps, _ = x_BSD.shape
        q = self.q_norm(self.q(x_BSD).view(batch, steps, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x_BSD).view(batch, steps, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x_BSD).view(batch, steps, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask = None
        if cache is not None:
            if cache.length and steps > 1:  # several steps after others: causal, aligned to the end of the keys
                mask = torch.ones(steps, cache.length + steps, dtype=torch.bool, device=q.device).tril(cache.length)
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and steps > 1, enable_gqa=self.kv_heads != self.heads
        )
        return self.o(y.transpose(1, 2).reshape(batch, steps, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = ffn_width(config)
        self.gate = nn.Linear(config.dim, width, bias=False)
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, cache)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


class Transformer(nn.Module):
    """The blocks and the final norm: embedded steps in, hidden states out; embeddings and heads belong to the stage."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.dim // config.heads, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), the two outputs into the residual stream scaled down by depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.o.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if into_residual else 0.02)

    def forward(self, x_BSD: Tensor, positions_S: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states `[B, S, D]` of steps at `positions_S`; with a cache they follow the steps already in it."""
        rotary = self.rotary.tables(positions_S, x_BSD.dtype)
        for block in self.blocks:
            x_BSD = block(x_BSD, rotary, cache)
        if cache is not None:
            cache.length += x_BSD.shape[1]
        return self.norm(x_BSD)
