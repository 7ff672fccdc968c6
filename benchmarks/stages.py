"""The stages of a recipe with random weights, and random codes for them: what the speed benchmarks work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from launcher.recipe import Recipe
from model.config import ExecutionConfig, StageModelConfig, StageName
from model.counting import token_fields
from model.fields import CONDITIONING
from model.stage import StageTransformer, build_stage

SMALL = (
    "stage_defaults.model.transformer.dim=64",
    "stage_defaults.model.transformer.layers=2",
    "stage_defaults.model.transformer.heads=2",
    "stage_defaults.model.window_seconds=1.0",
)
"""Overrides under which a benchmark runs in seconds: to see that it works, not to measure."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """How a stage of the recipe is laid out and conditioned."""

    pattern: Literal["flat", "delay"]
    aligned: bool = False
    """Conditions added to the steps at the same moment, as in the recipe `quickstart`, instead of the recipe's own."""

    @property
    def name(self) -> str:
        return f"{self.pattern}, aligned conditions" if self.aligned else self.pattern

    def of(self, config: StageModelConfig) -> StageModelConfig:
        values = config.model_dump()
        values["pattern"] = self.pattern
        if self.aligned:
            for condition in values["conditions"]:
                condition["paths"] = ["summed" if condition["field"] == CONDITIONING else "aligned"]
        return StageModelConfig.model_validate(values)


VARIANTS = (Variant("flat"), Variant("delay"), Variant("delay", aligned=True), Variant("flat", aligned=True))


def new_stage(
    recipe: Recipe, name: StageName, variant: Variant, dtype: str, device: str, execution: ExecutionConfig
) -> StageTransformer:
    """A stage of `recipe`, its parameters random and of `dtype`."""
    fields = token_fields(recipe.encoders, recipe.quantizers)
    conditioning = recipe.quantizers.conditioning
    centroids = torch.randn(conditioning.levels, conditioning.codebook_size, recipe.encoders.joint.dim)
    config = variant.of(getattr(recipe.stages, name).model)
    stage = build_stage(config, fields, {CONDITIONING: centroids}).to(device, DTYPES[dtype])
    stage.configure(execution)
    return stage


def random_codes(recipe: Recipe, seconds: float, batch: int, device: str) -> dict[str, Tensor]:
    """Codes of every field over `seconds`; of the joint embedding one row, as every window has."""
    codes = {}
    for name, field in token_fields(recipe.encoders, recipe.quantizers).items():
        frames = 1 if name == CONDITIONING else field.frames(seconds)
        codes[name] = torch.randint(field.codebook_size, (batch, frames, field.quantizers), device=device)
    return codes


def synchronizer(device: str) -> Callable[[], None]:
    """Waits for what the device was told to do, so that a clock read after it counts it."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


def accelerator(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
