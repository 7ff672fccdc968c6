"""Attention kernels behind one call, and the choice between them.

Shapes are named by letters: B batch, H heads, K key/value heads, S queries, T keys, E head width. The S queries are the
last S of the T keys, and each sees itself and what lies before it. Windows that are packed lie end to end in a batch
of one and do not see each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import AttentionName
from model.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packing:
    """Where windows of different lengths lie in one row without padding."""

    lengths: tuple[int, ...]

    def bounds(self, device: torch.device) -> Tensor:
        """Cumulative lengths from 0, int32 `[windows + 1]`: the form that varlen kernels take."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)

    def mask(self, device: torch.device) -> Tensor:
        """`[S, S]`: True where a step may look: backwards, within its own window."""
        window = torch.repeat_interleave(
            torch.arange(len(self.lengths), device=device), torch.tensor(self.lengths, device=device)
        )
        return (window[:, None] == window[None]).tril()


Attend = Callable[[Tensor, Tensor, Tensor, Packing | None], Tensor]
"""`(q [B, H, S, E], k [B, K, T, E], v [B, K, T, E], packing) -> [B, H, S, E]`"""


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """`[S, T]`: the queries are the last of the keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def math(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """The definition, written out: what every other backend is compared with. Softmax in fp32 or better."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mask = packing.mask(q.device) if packing else causal_mask(q.shape[2], k.shape[2], q.device)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """torch's own, which on a GPU takes the flash kernel that is switched on."""
    grouped = q.shape[1] != k.shape[1]
    if packing is not None:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return _varlen(q, k, v, packing)
        # A block mask would give the same and compute every pair of windows only to throw it away.
        parts = zip(*(x.split(list(packing.lengths), dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(q, k, v, None) for q, k, v in parts], dim=2)
    queries, keys = q.shape[2], k.shape[2]
    if queries in (1, keys):  # one query, the last, sees every key
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=grouped)
    mask = causal_mask(queries, keys, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.bounds(q.device), max(packing.lengths)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    y = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(y, Tensor)
    return y.transpose(0, 1)[None]


def flash2(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """flash-attn 2 (Dao 2023), which lays heads out after steps."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if packing is None:
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    bounds, longest = packing.bounds(q.device), max(packing.lengths)
    y = flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, longest, longest, causal=True)
    return y[None].transpose(1, 2)


def choose(name: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, Attend]:
    """The backend `name` with its function; `auto` is the best that works for such tensors, and is logged once.

    Raises UserError for a name that is unknown, or a backend that is not installed or cannot run here.
    """
    if name not in get_args(AttentionName):
        raise UserError(f"there is no attention backend {name!r}: choose one of {', '.join(get_args(AttentionName))}.")
    if name != "auto":
        wrong = _trial(name, device, dtype, head_dim)
        if wrong:
            raise UserError(f"attention backend {name!r} cannot be used here: {wrong}. Set attention to auto or sdpa.")
        return name, _ready(name)
    best = _best(device, dtype, head_dim)
    return best, _ready(best)


@lru_cache(maxsize=16)
def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    passed_over = []
    for name in ("flash4", "flash3", "flash2") if device.type == "cuda" else ():
        wrong = _trial(name, device, dtype, head_dim)
        if not wrong:
            log.info("attention: %s", name)
            return name
        passed_over.append(f"{name}: {wrong}")
    log.info("attention: sdpa%s", f" ({'; '.join(passed_over)})" if passed_over else "")
    return "sdpa"


def _ready(name: str) -> Attend:
    """The function of a backend, torch's flash kernel switched to the one that it means."""
    if torch.cuda.is_available():
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

        if name in _SWITCHED:
            activate_flash_attention_impl(_SWITCHED[name][0])
        else:
            restore_flash_attention_impl()
    return {"math": math, "flash2": flash2}.get(name, sdpa)


_SWITCHED = {"flash3": ("FA3", (9,), "flash-attn-3"), "flash4": ("FA4", (9, 10), "flash-attn-4")}
"""torch's name, the major compute capabilities it is made for, and the package that brings it."""


def _trial(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the backend from working on such tensors, or None: a small attention is computed and compared."""
    if name in ("math", "sdpa"):
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and the model is on the {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or fp16, and the model is in {str(dtype).removeprefix('torch.')}"
    major, _ = torch.cuda.get_device_capability(device)
    if name in _SWITCHED and major not in _SWITCHED[name][1]:
        return f"it is not made for compute capability {major}.x"
    package = _SWITCHED[name][2] if name in _SWITCHED else "flash-attn"
    q, k, v = torch.randn(3, 1, 2, 64, head_dim, device=device, dtype=dtype, requires_grad=True).unbind()
    try:
        y = _ready(name)(q, k, v, None)
        y.sum().backward()
    except ImportError:
        return f"the package {package} is not installed"
    except (RuntimeError, ValueError) as error:  # how these packages say that their kernels are not for this GPU
        return f"it failed on a small trial ({str(error).splitlines()[0]})"
    worst = (y - math(q, k, v, None)).abs().max().item()
    return None if worst < 0.05 else f"it differs from the reference by {worst:.2g} on a small trial"
