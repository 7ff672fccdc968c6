"""Recipes: one YAML file that names everything, checked before anything starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data.config import DataConfig
from model.config import Config, EncodersConfig, QuantizersConfig
from trainer.config import StageConfig


class SamplingConfig(Config):
    """How the bundle makes music when nothing else is said."""

    temperature: dict[Literal["semantic", "coarse", "fine"], PositiveFloat] = {}
    top_k: dict[Literal["semantic", "coarse", "fine"], PositiveInt] = {}
    cfg: dict[Literal["semantic", "coarse", "fine"], float] = {}
    """Guidance scale per stage; 1 is none."""


class EvaluationConfig(Config):
    prompts: PositiveInt = 32
    """Held-out prompts generated at the end of the run (or as many as there are captions)."""
    seconds: PositiveFloat = 5.0


class StagesConfig(Config):
    semantic: StageConfig
    coarse: StageConfig
    fine: StageConfig


class Recipe(Config):
    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    parallel: PositiveInt = 1
    """Stages that may run on this machine at the same time."""
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    quantizers: QuantizersConfig = QuantizersConfig()
    stages: StagesConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
