"""The three transformers. The trainer builds them, on as many ranks as the recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.stage import Stage, picked
from model.config import STAGES as NAMES

if TYPE_CHECKING:
    from launcher.recipe import Recipe

WITHOUT_EFFECT = (
    "ranks", "micro_batch", "zero", "workers", "log_every", "validate_every", "validate_windows", "sample_every",
    "checkpoint_every", "checkpoint_async", "keep_last", "keep_every", "keep_best", "upload", "resume", "hang_timeout",
    "startup_timeout", "straggler_factor", "gc_every", "profile", "wandb", "attention", "compile", "kernels",
    "recompute",
)  # fmt: skip
"""Keys of `train` that say where, how and how often, not what is learnt: changing them rebuilds nothing."""
STEERING = {"plateau": ("validate_every", "validate_windows")}
"""Those of them that a schedule learns by."""


def _stage(name: str) -> Stage:
    key = f"stages.{name}"

    def keys(recipe: Recipe) -> dict[str, Any]:
        steering = STEERING.get(getattr(recipe.stages, name).train.schedule, ())
        without = tuple(f"{key}.train.{part}" for part in WITHOUT_EFFECT if part not in steering)
        return picked("seed", key, without=without)(recipe)

    return Stage(name, ("quantizers", "tokens"), keys, 1, None)


STAGES = tuple(_stage(name) for name in NAMES)
