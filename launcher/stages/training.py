"""The three transformers. The trainer builds them, on as many ranks as the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.stage import Stage, picked
from model.config import STAGES as NAMES
from model.errors import UserError

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from trainer.config import TrainConfig

WITHOUT_EFFECT = (
    "ranks", "micro_batch", "zero", "workers", "log_every", "validate_every", "validate_windows", "sample_every",
    "checkpoint_every", "checkpoint_async", "keep_last", "keep_every", "keep_best", "upload", "resume", "hang_timeout",
    "startup_timeout", "straggler_factor", "gc_every", "profile", "wandb", "attention", "compile", "kernels",
    "recompute", "cache", "cache_limit",
)  # fmt: skip
"""Keys of `train` that say where, how and how often, not what is learnt: changing them rebuilds nothing."""
STEERING = {"plateau": ("validate_every", "validate_windows")}
"""Those of them that a schedule learns by."""


def _stage(name: str) -> Stage:
    key = f"stages.{name}"

    def keys(recipe: Recipe) -> dict[str, Any]:
        steering = STEERING.get(getattr(recipe.stages, name).train.schedule, ())
        without = tuple(f"{key}.train.{part}" for part in WITHOUT_EFFECT if part not in steering)
        found = picked("seed", key, without=(*without, f"{key}.train.mix", f"{key}.train.init_from"))(recipe)
        train = getattr(recipe.stages, name).train
        return {**found, **_mixed(key, train), **_initial(key, train)}

    return Stage(name, ("quantizers", "tokens"), keys, 2, None)


def _mixed(key: str, train: TrainConfig) -> dict[str, Any]:
    """For a stage that mixes other corpora with the run's own: which tokens they are, wherever they lie."""
    if not train.mix:
        return {}
    from data.token_corpus import artifact_manifest

    mixed = [[artifact_manifest(other.tokens)[1]["fingerprint"], other.weight] for other in train.mix]
    return {f"the tokens of {key}.train.mix": mixed}


def _initial(key: str, train: TrainConfig) -> dict[str, Any]:
    """For a stage that begins with weights from elsewhere: which they are, wherever they lie."""
    if train.init_from is None:
        return {}
    from trainer.weights_kinds import weights_fingerprint

    try:
        return {f"the weights of {key}.train.init_from": weights_fingerprint(Path(train.init_from))}
    except UserError as error:
        raise UserError(f"{key}.train.init_from: {error}") from None


STAGES = tuple(_stage(name) for name in NAMES)
