"""The number type that a pretrained encoder computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def computing_in(name: str, device: torch.device) -> AbstractContextManager:
    """A context in which models in fp32 on `device` multiply matrices in `name`; norms and softmax stay in fp32.

    `auto` is bf16 on a GPU and fp32 on a CPU.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return torch.autocast(device.type, DTYPES[name], enabled=name != "fp32")
