"""What export and import ask of a bundle, of a stage's name and of the disk."""

from __future__ import annotations

from model.artifact import Artifact
from model.bundle import QUANTIZERS, load_stage, read_tensors
from model.config import STAGES, StageName
from model.errors import UserError, nearest
from model.stage import StageTransformer


def stage_of(bundle: Artifact, name: StageName) -> StageTransformer:
    """One stage of `bundle`, in fp32 on the CPU."""
    return load_stage(bundle.path, bundle.info, name, read_tensors(bundle.path / QUANTIZERS)).eval()


def stage_called(name: str) -> StageName:
    """`name`, where it is that of a stage. Raises UserError where it is not."""
    for stage in STAGES:
        if stage == name:
            return stage
    raise UserError(f"there is no stage {name!r}.{nearest(name, STAGES)} Choose {', '.join(STAGES)}.")
