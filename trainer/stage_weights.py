"""The fp32 weights of a finished stage, read one parameter at a time, however large the model: as trained, their moving
average, or the mean over its newest checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import artifact
from model.artifact import Artifact
from model.errors import UserError
from trainer import checkpoint_folder
from trainer.optimizer import AVERAGE
from trainer.saved_sources import open_saved
from trainer.saved_state import SavedState
from trainer.setup import AVERAGE_WEIGHTS, WEIGHTS
from trainer.tensor_files import WEIGHTS as TRAINED
from trainer.weights_kinds import STAGE


@dataclass(frozen=True)
class StageWeights:
    """Where the weights of a stage come from, checked and ready to be read."""

    stage: Artifact
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter, by name."""
    read: Callable[[str], Tensor]
    """A parameter's fp32 value."""
    digests: dict[str, str]
    """SHA-256 of the files that are read, by their path in the stage's folder."""


def read_weights(run: Path, name: str, average: bool = False, last: int | None = None) -> StageWeights:
    """The weights of stage `name` of `run`: as trained, their moving `average`, or their mean over the `last` so many
    checkpoints.

    Every file that is needed is digested first. Raises UserError where the stage is not finished, keeps no average, has
    fewer checkpoints, or a file is not what its manifest says.
    """
    stage = artifact.read(run / name, STAGE)
    state = _checked(stage.path)
    if average and AVERAGE not in state.kinds:
        raise UserError(
            f"stage {name!r} has no average of its weights: train it with stages.{name}.train.ema_decay, such as 0.999."
        )
    if last is not None:
        return _mean(stage, state.shapes, _newest(stage, name, last))
    file, kind = (AVERAGE_WEIGHTS, AVERAGE) if average else (WEIGHTS, TRAINED)
    digests = {file: stage.manifest["files"][file]["sha256"]}
    found = StageWeights(stage, state.shapes, partial(state.read, kind), digests)
    _compare_with_checkpoint(found, kind)
    return found


def _checked(path: Path) -> SavedState:
    try:
        state = open_saved(path)
        state.check(())  # all files of a manifest
    except UserError as error:
        raise UserError(f"{error} Bring back a copy of it, or train that stage again.") from None
    return state


def _newest(stage: Artifact, name: str, count: int) -> list[SavedState]:
    """The newest `count` checkpoints, which are whole and of this stage as it was trained to its end."""
    folder = stage.path / "checkpoints"
    steps = checkpoint_folder.steps_in(folder)
    if len(steps) < count:
        there = "1 checkpoint" if len(steps) == 1 else f"{len(steps)} checkpoints"
        raise UserError(
            f"{folder} holds {there}, {count} are to be averaged: ask for fewer, or keep more while training "
            f"(stages.{name}.train.keep_last)."
        )
    found = [_checked(folder / checkpoint_folder.step_name(step)) for step in steps[:count]]
    for checkpoint in found:
        if _manifest(checkpoint)["inputs"] != stage.manifest["inputs"]:
            raise UserError(f"{checkpoint.path} is of another training than {stage.path}: move it away.")
    return found


def _manifest(checkpoint: SavedState) -> dict[str, Any]:
    assert checkpoint.whole is not None  # Stretto's own have one
    return checkpoint.whole.manifest


def _mean(stage: Artifact, shapes: dict[str, tuple[int, ...]], checkpoints: list[SavedState]) -> StageWeights:
    def read(key: str) -> Tensor:
        total = torch.zeros(shapes[key], dtype=torch.float64)
        for checkpoint in checkpoints:
            total += checkpoint.read(TRAINED, key)
        return (total / len(checkpoints)).float()

    digests = {
        f"{checkpoint.path.relative_to(stage.path).as_posix()}/{file}": described["sha256"]
        for checkpoint in checkpoints
        for file, described in _manifest(checkpoint)["files"].items()
        if file.endswith(".safetensors")
    }
    return StageWeights(stage, shapes, read, digests)


def _compare_with_checkpoint(weights: StageWeights, kind: str) -> None:
    """Raises RuntimeError unless the weights are, to the bit, those of the checkpoint of the last step, where that is
    still there and whole: two ways out of the training engine must lead to the same."""
    place = weights.stage.path / "checkpoints" / checkpoint_folder.step_name(weights.stage.info["steps"])
    if checkpoint_folder.problems(place):
        return
    checkpoint = open_saved(place)
    if _manifest(checkpoint)["inputs"] != weights.stage.manifest["inputs"]:
        return
    for key in weights.shapes:
        if not torch.equal(checkpoint.read(kind, key), weights.read(key)):
            raise RuntimeError(f"{key} in {weights.stage.path} is not what the training saved last in {place}")
