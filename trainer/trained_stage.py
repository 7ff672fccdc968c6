"""Another stage of the same run as far as it has come: finished, or at its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from model import artifact
from model.errors import UserError
from model.stage import StageTransformer
from trainer import checkpoint_folder
from trainer.saved_sources import open_saved
from trainer.setup import WEIGHTS, StageSetup
from trainer.tensor_files import WEIGHTS as TRAINED
from trainer.weights_kinds import STAGE


def trained_stage(run: Path, name: str) -> StageTransformer | None:
    """Stage `name` of `run` with its newest weights, in fp32 on the CPU; None where it has none that were trained as
    the run folder now says, on the tokens that it now holds."""
    folder = run / name
    finished = (folder / artifact.MANIFEST).exists()
    steps = checkpoint_folder.steps_in(folder / "checkpoints")
    if not finished and not steps:
        return None
    try:
        setup = StageSetup.read(run, name)
        found = artifact.read(folder, STAGE) if finished else _newest(folder / "checkpoints", steps[0])
        if found.manifest["inputs"] != setup.identity:
            return None
        stage = setup.build_model()
        if finished:
            stage.load_state_dict(load_file(folder / WEIGHTS))
        else:
            saved = open_saved(found.path)
            stage.load_state_dict({key: saved.read(TRAINED, key) for key in saved.shapes})
    except (UserError, FileNotFoundError):  # that stage may start over or be moved away at this moment
        return None
    return stage


def _newest(folder: Path, step: int) -> artifact.Artifact:
    return checkpoint_folder.read(folder / checkpoint_folder.step_name(step))
