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
from model.errors import UserError
from model.fields import CONDITIONING, SEMANTIC, TokenField
from model.stage import StageTransformer
from trainer.config import StageConfig

STAGES = ("semantic", "coarse", "fine")


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
        return cls(run, stage, config, recipe["seed"], fields, tokens.info["captions"], fingerprint)

    def build_model(self) -> StageTransformer:
        """The stage with fresh weights, the same on every rank, and the quantizers' centroids in place."""
        torch.manual_seed(self.seed)
        return build_stage(self.config, self.fields, load_file(self.run / "quantizers" / "quantizers.safetensors"))


def build_stage(
    config: StageConfig, fields: dict[str, TokenField], quantizers: dict[str, torch.Tensor]
) -> StageTransformer:
    """A stage whose summed conditions hold the centroids of `quantizers` (`[levels, codebook size, dim]` a field)."""
    centroids = {name: quantizers[name] for name in (CONDITIONING, SEMANTIC)}
    model = StageTransformer(config.model, fields, {name: value.shape[-1] for name, value in centroids.items()})
    for condition in model.conditions:
        if "summed" in condition.paths:
            condition.load_centroids(centroids[condition.field.name])
    return model
