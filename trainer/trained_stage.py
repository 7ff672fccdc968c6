"""Another stage of the same run as far as it has come: finished, or at its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import artifact
from model.errors import UserError
from model.stage import StageTransformer
from trainer import checkpoint_folder, tensor_files
from trainer.setup import KIND, WEIGHTS, StageSetup
from trainer.tensor_files import SlicedTensors


def trained_stage(run: Path, name: str) -> StageTransformer | None:
    """Stage `name` of `run` with its newest weights, in fp32 on the CPU; None where it has none that were trained as
    the run folder now says, on the tokens that it now holds."""
    folder = run / name
    finished = (folder / artifact.MANIFEST).exists()
    saved = checkpoint_folder.steps_in(folder / "checkpoints")
    if not finished and not saved:
        return None
    try:
        setup = StageSetup.read(run, name)
        found = artifact.read(folder, KIND) if finished else _newest(folder / "checkpoints", saved[0])
        if found.manifest["inputs"] != setup.identity:
            return None
        stage = setup.build_model()
        stage.load_state_dict(load_file(folder / WEIGHTS) if finished else _saved_weights(found, stage))
    except (UserError, FileNotFoundError):  # that stage may start over or be moved away at this moment
        return None
    return stage


def _newest(folder: Path, step: int) -> artifact.Artifact:
    return checkpoint_folder.read(folder / checkpoint_folder.step_name(step))


def _saved_weights(found: artifact.Artifact, stage: StageTransformer) -> dict[str, Tensor]:
    files = [found.path / checkpoint_folder.rank_file(rank) for rank in range(found.info["world_size"])]
    tensors, weights = SlicedTensors(files), {}
    for name, parameter in stage.named_parameters():
        weights[name] = torch.empty(parameter.shape)
        tensors.read(tensor_files.WEIGHTS, name, 0, weights[name].view(-1))
    return weights
