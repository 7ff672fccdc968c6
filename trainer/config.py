"""Typed configuration of stage training. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from model.config import Config, ExecutionConfig, StageModelConfig


class TrainConfig(ExecutionConfig):
    """How a stage is trained."""

    steps: PositiveInt = 1000
    ranks: PositiveInt = 2
    """Processes (one GPU each where there are GPUs)."""
    global_batch: PositiveInt = 32
    """Windows a step, over all ranks."""
    micro_batch: PositiveInt | None = None
    """Windows a rank and forward pass; global_batch / ranks when not given."""
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 50
    final_learning_rate: NonNegativeFloat = 0.0
    """Where the cosine ends, as a share of learning_rate."""
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    zero: str = "zero2"
    """A file of ds_configs/ (without .json), or a path to a DeepSpeed JSON file."""
    packing: bool = False
    """Windows of a rank in one row without padding, so that clips shorter than window_seconds are windows too. Every
    code then counts alike, so a long window for more than a short one."""
    text_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a window is conditioned on its caption's tokens in place of its audio's."""
    workers: NonNegativeInt = 0
    """Data loader processes a rank."""
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: int = Field(2, ge=2)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        micro = self.micro_batch or max(1, self.global_batch // self.ranks)
        if self.global_batch % (micro * self.ranks):
            raise ValueError(
                f"global_batch {self.global_batch} must be a multiple of ranks × micro_batch = {self.ranks} × {micro}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class StageConfig(Config):
    """One of the three transformers: what it is and how it is trained."""

    model: StageModelConfig
    train: TrainConfig = TrainConfig()
