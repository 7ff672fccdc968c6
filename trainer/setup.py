"""What one stage's training needs to know, read from the run folder by every rank alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from model import artifact
from model.config import STAGES
from model.errors import UserError
from model.fields import TokenField
from model.stage import StageTransformer, build_stage
from trainer.config import StageConfig

WEIGHTS = "model.safetensors"
"""The file that a trained stage leaves."""
SWAP = "swap"
"""Folder of what ZeRO moves to NVMe while a stage trains."""
AVERAGE_WEIGHTS = "average.safetensors"
"""And with this one where `ema_decay` is set: the moving average of its weights."""


@dataclass(frozen=True)
class StageSetup:
    """One of the three stages of a run, with the artifacts it is trained from."""

    run: Path
    stage: str
    config: StageConfig
    seed: int
    fields: dict[str, TokenField]
    captions: bool
    """Whether the corpus has captions, whose tokens may stand in for the audio's."""
    fingerprint: str
    tokens_fingerprint: str

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must have been made with to be gone on from, in words that an error uses."""
        return {
            "architecture": artifact.fingerprint(self.config.model.model_dump(mode="json")),
            "tokens artifact": self.tokens_fingerprint,
            "recipe": self.fingerprint,
        }

    @property
    def folder(self) -> Path:
        return self.run / self.stage

    @property
    def tokens(self) -> Path:
        return self.run / "tokens"

    @property
    def fields_used(self) -> list[str]:
        """The fields a batch must hold."""
        return list(dict.fromkeys([self.config.model.field, *(part.field for part in self.config.model.conditions)]))

    @classmethod
    def read(cls, run: Path, stage: str) -> StageSetup:
        """Raises UserError where the run folder does not say what to train."""
        if stage not in STAGES:
            raise UserError(f"there is no stage {stage!r} to train: choose one of {', '.join(STAGES)}.")
        try:
            recipe = yaml.safe_load((run / "recipe.yaml").read_text())
            config = StageConfig.model_validate(recipe["stages"][stage])
            fingerprint = json.loads((run / stage / "stage.json").read_text())["fingerprint"]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: start the run with `stretto run RECIPE -o {run}`.") from None
        except (ValidationError, KeyError, TypeError) as error:
            raise UserError(f"{run / 'recipe.yaml'} does not describe stage {stage!r}: {error}") from None
        tokens = artifact.read(run / "tokens", "tokens")
        fields = {name: TokenField.from_json(value) for name, value in tokens.info["fields"].items()}
        return cls(run, stage, config, recipe["seed"], fields, tokens.info["captions"], fingerprint, tokens.fingerprint)

    def build_model(self) -> StageTransformer:
        """The stage with fresh weights, the same on every rank, and the quantizers' centroids in place."""
        torch.manual_seed(self.seed)
        quantizers = load_file(self.run / "quantizers" / "quantizers.safetensors")
        return build_stage(self.config.model, self.fields, quantizers)
