"""The fp32 weights of a finished stage, read one parameter at a time, however large the model: as trained, their moving
average, or the mean over its newest checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model import artifact
from model.artifact import Artifact
from model.errors import UserError
from trainer import checkpoint_folder
from trainer.optimizer import AVERAGE
from trainer.setup import AVERAGE_WEIGHTS, KIND, WEIGHTS
from trainer.tensor_files import WEIGHTS as CHECKPOINT_WEIGHTS
from trainer.tensor_files import SlicedTensors


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
    stage = artifact.read(run / name, KIND)
    _check(artifact.problems(stage))
    if average and AVERAGE_WEIGHTS not in stage.manifest["files"]:
        raise UserError(
            f"stage {name!r} has no average of its weights: train it with stages.{name}.train.ema_decay, such as 0.999."
        )
    file = AVERAGE_WEIGHTS if average else WEIGHTS
    tensors = safe_open(stage.path / file, framework="pt")
    shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    if last is not None:
        return _mean(stage, shapes, _newest(stage, name, last))
    digests = {file: stage.manifest["files"][file]["sha256"]}
    found = StageWeights(stage, shapes, tensors.get_tensor, digests)
    _compare_with_checkpoint(found, AVERAGE if average else CHECKPOINT_WEIGHTS)
    return found


def _check(problems: list[str]) -> None:
    if problems:
        raise UserError(f"{problems[0]}. Bring back a copy of it, or train that stage again.")


def _newest(stage: Artifact, name: str, count: int) -> list[Artifact]:
    """The newest `count` checkpoints, which are whole and of this stage as it was trained to its end."""
    folder = stage.path / "checkpoints"
    steps = checkpoint_folder.steps_in(folder)
    if len(steps) < count:
        raise UserError(
            f"{folder} holds {len(steps)} checkpoints, {count} are to be averaged: ask for fewer, or keep more while "
            f"training (stages.{name}.train.keep_last)."
        )
    found = []
    for step in steps[:count]:
        place = folder / checkpoint_folder.step_name(step)
        _check(checkpoint_folder.problems(place))
        found.append(checkpoint_folder.read(place))
        if found[-1].manifest["inputs"] != stage.manifest["inputs"]:
            raise UserError(f"{place} is of another training than {stage.path}: move it away.")
    return found


def _mean(stage: Artifact, shapes: dict[str, tuple[int, ...]], checkpoints: list[Artifact]) -> StageWeights:
    sources = [saved_tensors(checkpoint) for checkpoint in checkpoints]

    def read(key: str) -> Tensor:
        total = torch.zeros(shapes[key], dtype=torch.float64)
        for source in sources:
            total += whole(source, CHECKPOINT_WEIGHTS, key, shapes[key])
        return (total / len(sources)).float()

    digests = {
        f"{checkpoint.path.relative_to(stage.path).as_posix()}/{file}": described["sha256"]
        for checkpoint in checkpoints
        for file, described in checkpoint.manifest["files"].items()
        if file.endswith(".safetensors")
    }
    return StageWeights(stage, shapes, read, digests)


def saved_tensors(checkpoint: Artifact) -> SlicedTensors:
    """What all ranks have saved in a checkpoint."""
    ranks = range(checkpoint.info["world_size"])
    return SlicedTensors([checkpoint.path / checkpoint_folder.rank_file(rank) for rank in ranks])


def whole(tensors: SlicedTensors, kind: str, key: str, shape: Sequence[int]) -> Tensor:
    """A parameter of a checkpoint, or what else `kind` says of it, fp32."""
    value = torch.empty(shape)
    tensors.read(kind, key, 0, value.view(-1))
    return value


def _compare_with_checkpoint(weights: StageWeights, kind: str) -> None:
    """Raises RuntimeError unless the weights are, to the bit, those of the checkpoint of the last step, where that is
    still there and whole: two ways out of the training engine must lead to the same."""
    place = weights.stage.path / "checkpoints" / checkpoint_folder.step_name(weights.stage.info["steps"])
    if checkpoint_folder.problems(place):
        return
    checkpoint = checkpoint_folder.read(place)
    if checkpoint.manifest["inputs"] != weights.stage.manifest["inputs"]:
        return
    tensors = saved_tensors(checkpoint)
    for key, shape in weights.shapes.items():
        if not torch.equal(whole(tensors, kind, key, shape), weights.read(key)):
            raise RuntimeError(f"{key} in {weights.stage.path} is not what the training saved last in {place}")
