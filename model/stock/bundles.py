"""What export and import ask of a bundle, of a stage's name and of the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from model import artifact
from model.artifact import Artifact
from model.config import STAGES, StageModelConfig, StageName
from model.errors import UserError, nearest
from model.fields import TokenField
from model.pipeline import KIND, QUANTIZERS
from model.stage import StageTransformer, build_stage


def whole_bundle(path: Path) -> Artifact:
    """The bundle at `path`, every file of which was read. Raises UserError where one is missing or has changed."""
    bundle = artifact.read(path, KIND)
    problems = artifact.problems(bundle)
    if problems:
        raise UserError(f"The bundle {path} is not whole: {problems[0]}. Export it again.")
    return bundle


def stage_file(name: StageName) -> str:
    """What holds the weights of a stage in a bundle."""
    return f"{name}.safetensors"


def load_stage(bundle: Artifact, name: StageName) -> StageTransformer:
    """One stage of `bundle`, in fp32 on the CPU."""
    fields = {field: TokenField.from_json(value) for field, value in bundle.info["fields"].items()}
    config = StageModelConfig.model_validate(bundle.info["stages"][name])
    stage = build_stage(config, fields, load_file(bundle.path / QUANTIZERS))
    stage.load_state_dict(load_file(bundle.path / stage_file(name)))
    return stage.eval()


def stage_called(name: str) -> StageName:
    """`name`, where it is that of a stage. Raises UserError where it is not."""
    for stage in STAGES:
        if stage == name:
            return stage
    raise UserError(f"there is no stage {name!r}.{nearest(name, STAGES)} Choose {', '.join(STAGES)}.")


def require_room(output: Path, needed: int) -> None:
    """Raises UserError where the disk of `output` has fewer than `needed` bytes."""
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{output} needs {needed / 1e9:.2g} GB and {place} has {free / 1e9:.2g}: make room first.")
