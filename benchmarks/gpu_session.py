"""What one call of `gpu.py` works with: the sizes, the time it has, the record it adds to and the device it is on."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import cpu, output, write
from rich.console import Console
from stages import Variant, accelerator, new_stage

from launcher.recipe import Recipe, load_recipe
from model.config import ExecutionConfig
from model.stage import StageTransformer

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "liger-kernel",
)
DTYPE = "bf16"
FLAT = Variant("flat")
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by what the device's name holds, as its maker states them."""


@dataclass(frozen=True)
class Size:
    """The coarse stage of `musiclm_small` with another transformer."""

    dim: int
    layers: int
    heads: int
    batch: int
    """Windows a training step."""
    window_seconds: float = 4.04  # 1,123 positions
    mfu_aim: float | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def recipe(self) -> Recipe:
        shape = f"{{dim: {self.dim}, layers: {self.layers}, heads: {self.heads}}}"
        overrides = (
            f"stage_defaults.model.transformer={shape}",
            f"stages.coarse.model.window_seconds={self.window_seconds}",
        )
        return load_recipe("musiclm_small", overrides)


SIZES = {
    "100M": Size(768, 12, 12, 32),
    "300M": Size(1024, 24, 8, 32, mfu_aim=0.5),
    "1B": Size(2048, 20, 16, 16, mfu_aim=0.6),
    "small": Size(64, 2, 2, 2, window_seconds=0.4),
}
"""Heads of 64 or 128; `small` shows that it works and measures nothing."""


@dataclass(frozen=True)
class Session:
    arguments: argparse.Namespace
    console: Console
    ends: float
    """When by the monotonic clock nothing more is started."""

    @property
    def device(self) -> str:
        return self.arguments.device

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of the device, as said or as known."""
        if self.arguments.peak:
            return self.arguments.peak * 1e12
        name = accelerator(self.device) or ""
        slower = "PCIe" in name or "NVL" in name  # chips of the same name with a lower clock
        return next((flops for part, flops in PEAKS.items() if part in name and not slower), None)

    def time_is_up(self) -> bool:
        return time.monotonic() > self.ends

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def new_stage(self, recipe: Recipe, execution: ExecutionConfig) -> StageTransformer:
        with torch.device(self.device):  # made where it will be: drawing a billion numbers takes a CPU long
            return new_stage(recipe, "coarse", FLAT, DTYPE, self.device, execution)

    def header(self) -> dict[str, Any]:
        """What an entry of the record says of where it comes from."""
        installed = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
        settings = {name: value for name, value in vars(self.arguments).items() if name not in ("record", "commit")}
        return {
            "command": shlex.join(["python", *sys.argv]),
            "commit": self.arguments.commit or output("git", "rev-parse", "HEAD"),
            "machine": {"accelerator": accelerator(self.device), "cpu": cpu()},
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed},
            "settings": settings | {"dtype": DTYPE},
            "peak_tflops_per_second": self.peak and self.peak / 1e12,
        }

    def save(self, section: str, size: str, entry: dict[str, Any]) -> None:
        """Puts the entry of one section and size into the record, beside what is there."""
        path: Path | None = self.arguments.record
        if path:
            record = json.loads(path.read_text()) if path.exists() else {}
            record.setdefault(section, {})[size] = entry
            write(path, record)


@contextmanager
def failure_kept(said: dict[str, Any]) -> Iterator[None]:
    """A model that does not fit, or a kernel that does not run, is noted as `failed`; the others go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        said["failed"] = "does not fit in memory"
    except RuntimeError as error:
        said["failed"] = str(error).strip().splitlines()[0]


def release() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
