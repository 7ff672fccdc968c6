"""A Llama-shaped decoder: pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

Shapes are named by letters: B batch, S steps, D model width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import attention, kernels
from model.attention import Packing
from model.cache import LayerCache
from model.config import ExecutionConfig, TransformerConfig
from model.counting import ffn_width
from model.kernels import TORCH, Kernels, Rotary

log = logging.getLogger(__name__)

EPSILON = 1e-6
"""Of every RMSNorm."""


@lru_cache(maxsize=64)
def rotary_tables(
    positions: tuple[float, ...], head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Rotary position tables (Su et al. 2021) for real-valued positions.

    Angles are taken in fp64 and cast last: bf16 cannot tell position 257 from 258.
    """
    with torch.inference_mode(False):  # made while sampling, they must still serve training
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


class RMSNorm(nn.RMSNorm):
    """torch's, with a choice of kernels."""

    kernels = TORCH

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, EPSILON)


class Attention(nn.Module):
    kernels = TORCH

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.dim // config.heads
        self.q = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.attend: attention.Attend = attention.sdpa

    def forward(self, x_BSD: Tensor, rotary: Rotary, cache: LayerCache | None, packing: Packing | None) -> Tensor:
        batch, steps, _ = x_BSD.shape
        q = self.q_norm(self.q(x_BSD).view(batch, steps, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x_BSD).view(batch, steps, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x_BSD).view(batch, steps, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = self.kernels.rotate(q, k, rotary)
        y = self.attend(q, k, v, packing) if cache is None else cache.attend(self.attend, q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, steps, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    kernels = TORCH

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = ffn_width(config)
        self.gate = nn.Linear(config.dim, width, bias=False)
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_BSD: Tensor, rotary: Rotary, cache: LayerCache | None = None, packing: Packing | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, cache, packing)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


RunBlock = Callable[[Block, Tensor, Rotary, None, "Packing | None"], Tensor]


class Transformer(nn.Module):
    """The blocks and the final norm: embedded steps in, hidden states out; embeddings and heads belong to the stage."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self._run: RunBlock = Block.__call__

    def configure(self, execution: ExecutionConfig) -> None:
        """Sets how the blocks are computed, for weights of the type and on the device that they now have.

        Raises UserError where the attention backend or the kernels cannot be used here.
        """
        weight, head_dim = self.norm.weight, self.config.dim // self.config.heads
        _, attend = attention.choose(execution.attention, weight.device, weight.dtype, head_dim)
        for block in self.blocks:
            block.attention.attend = attend  # type: ignore[union-attr, assignment]
        run: RunBlock = Block.__call__
        if execution.recompute != "none":
            # Nothing in a block is random. What `selective` keeps is dear to make and cheap to hold.
            context = {"context_fn": _keep_products} if execution.recompute == "selective" else {}
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False, **context)  # type: ignore[arg-type]
        compiled = execution.compile == "on" or (execution.compile == "auto" and weight.is_cuda and _can_compile())
        self._take(kernels.choose(execution.kernels, weight.device, compiled))
        if compiled:
            # One compilation serves all blocks: their weights are inputs to it.
            run = torch.compile(run, dynamic=False)
        self._run = run

    def _take(self, chosen: Kernels) -> None:
        if not self.config.qk_norm:
            # Liger's turns queries and keys in place: without norms these are products, which `selective` keeps.
            chosen = replace(chosen, rotate=TORCH.rotate)
        for module in self.modules():
            if isinstance(module, (RMSNorm, Attention, FeedForward)):
                module.kernels = chosen

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary,
        cache: list[LayerCache] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Hidden states `[B, S, D]` of steps at the positions of `rotary`.

        With a cache they follow the steps already in it; with `packing` the row holds several windows.
        """
        for layer, block in enumerate(self.blocks):
            if cache is None:
                x_BSD = self._run(block, x_BSD, rotary, None, packing)  # type: ignore[arg-type]
            else:
                x_BSD = block(x_BSD, rotary, cache[layer])
        return self.norm(x_BSD)


@lru_cache(maxsize=1)
def _can_compile() -> bool:
    found = any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if not found:
        log.warning("compile: off, since no C compiler was found (cc, gcc, clang or $CC); training will be slower.")
    return found


def _keep_products() -> object:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: object, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = operation.name()
    kept = name == "aten::mm" or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
