"""The three transformers. The trainer builds them, on as many ranks as the recipe says."""

from __future__ import annotations

from launcher.stage import Stage, picked
from model.config import STAGES as NAMES

WITHOUT_EFFECT = (
    "ranks", "micro_batch", "zero", "workers", "log_every", "validate_every", "validate_windows", "sample_every",
    "checkpoint_every", "checkpoint_async", "keep_last", "keep_every", "keep_best", "upload", "resume", "hang_timeout",
    "startup_timeout", "straggler_factor", "gc_every", "profile", "wandb", "attention", "compile", "kernels",
    "recompute",
)  # fmt: skip
"""Keys of `train` that say where, how and how often, not what is learnt: changing them rebuilds nothing."""


def _stage(name: str) -> Stage:
    key = f"stages.{name}"
    keys = picked("seed", key, without=tuple(f"{key}.train.{part}" for part in WITHOUT_EFFECT))
    return Stage(name, ("quantizers", "tokens"), keys, 1, None)


STAGES = tuple(_stage(name) for name in NAMES)
