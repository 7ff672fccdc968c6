"""RMSNorm, rotary positions and SwiGLU: torch's own operations, or Liger's fused ones for a GPU.

What torch does in several passes over memory, Liger's Triton kernels (Hsu et al. 2024) do in one. torch.compile fuses
the same by itself, so they are for blocks that are not compiled, such as those of ZeRO-3.

Shapes are named by letters: B batch, H heads, K key/value heads, S steps, E head width, F width of the SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import KernelsName
from model.errors import UserError

Rotary = tuple[Tensor, Tensor]
"""cos and sin `[S, E]` of the angles of S positions."""


def rotate(x_BHSE: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (i, i + E/2) of a head by its angle: the layout of Llama in `transformers`."""
    cos_SE, sin_SE = rotary
    left, right = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos_SE + torch.cat([-right, left], dim=-1) * sin_SE


def rotate_both(q_BHSE: Tensor, k_BKSE: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    return rotate(q_BHSE, rotary), rotate(k_BKSE, rotary)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class Kernels:
    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """`(x [..., D], weight [D], eps) -> [..., D]` (Zhang & Sennrich 2019)"""
    rotate: Callable[[Tensor, Tensor, Rotary], tuple[Tensor, Tensor]]
    """`(q [B, H, S, E], k [B, K, S, E], rotary) -> q, k`; may write into what it is given."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """`(gate [..., F], up [..., F]) -> [..., F]`"""


TORCH = Kernels("torch", rms_norm, rotate_both, swiglu)


@lru_cache(maxsize=1)
def _liger() -> Kernels:
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # As torch does it, in fp32 until the end, and not into the gradient that it is given.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)

    def turn(q_BHSE: Tensor, k_BKSE: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return LigerRopeFunction.apply(q_BHSE, k_BKSE, *rotary)

    return Kernels("liger", norm, turn, LigerSiLUMulFunction.apply)


def choose(name: KernelsName, device: torch.device, compiled: bool) -> Kernels:
    """The kernels `name`, for blocks that are `compiled` or not. Raises UserError where Liger's cannot be used."""
    if name == "torch":
        return TORCH
    wrong = _obstacle(device, compiled)
    if wrong:
        raise UserError(f"kernels 'liger' cannot be used here: {wrong}. Set kernels to torch.")
    return _liger()


def _obstacle(device: torch.device, compiled: bool) -> str | None:
    if device.type != "cuda":
        return f"they need a GPU, and the model is on the {device.type}"
    if compiled:
        return "the blocks are compiled, which fuses the same by itself"
    return None if find_spec("liger_kernel") else "the package liger-kernel is not installed"
