"""What export and import ask of a bundle, of a stage's name and of the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

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


def require_room(output: Path, needed: int) -> None:
    """Raises UserError where the disk of `output` has fewer than `needed` bytes."""
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{output} needs {needed / 1e9:.2g} GB and {place} has {free / 1e9:.2g}: make room first.")
