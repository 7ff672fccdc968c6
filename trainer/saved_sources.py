"""Opens saved weights and optimizer state, whatever wrote them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from model import artifact
from model.artifact import Artifact
from model.errors import UserError
from trainer import checkpoint_folder, deepspeed_files, deepspeed_universal, setup
from trainer.checkpoint_folder import rank_file, step_name, steps_in
from trainer.optimizer import AVERAGE
from trainer.saved_state import SavedState
from trainer.setup import AVERAGE_WEIGHTS, StageSetup
from trainer.tensor_files import WEIGHTS, SlicedTensors, Stretch, stretches
from trainer.weights_kinds import (
    CHECKPOINT,
    CONVERTED,
    INDEX,
    NOT_KNOWN,
    SINGLE,
    UNIVERSAL,
    artifact_with_weights,
    identity,
    noted,
    tagged,
    weights_fingerprint,
)

SLICE = re.compile(r"[a-z_]+/.+/\d+")
"""What tensors are called in the files of a checkpoint's ranks."""


def open_saved(path: Path) -> SavedState:
    """What `path` holds; no data are read yet, and nothing is run that a file asks for.

    Raises UserError where there is nothing of the kind, files are missing, truncated, foreign or of several
    checkpoints, or a format is newer than this version.
    """
    if path.is_file() and path.suffix == ".safetensors":
        described = noted(path)
        state = _weights(path, [path])
        if state.shapes and all(SLICE.fullmatch(name) for name in state.shapes):
            raise UserError(f"{path} holds slices of weights: it is a part of a checkpoint, name its folder.")
        state.whole = described
        return state
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if (path / artifact.MANIFEST).is_file():
        return _artifact(artifact_with_weights(path))
    # What is exact comes first: transformers' trainer puts weights of 16 bits beside the checkpoint of its engine.
    folder = tagged(path) if path.is_dir() else path
    if folder != path:
        return _deepspeed(folder)
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return _listed(path)
    steps = steps_in(path) or steps_in(path / "checkpoints")
    if steps:
        raise UserError(f"{path} holds several checkpoints: name one of them, such as {step_name(steps[0])}.")
    if deepspeed_universal.is_universal(folder) or deepspeed_files.is_deepspeed(folder):
        return _deepspeed(folder)
    raise UserError(f"{path} {NOT_KNOWN}")


def _artifact(found: Artifact) -> SavedState:
    if found.kind == CHECKPOINT:
        return _checkpoint(checkpoint_folder.read(found.path))
    _require_whole(found)
    if found.kind == UNIVERSAL:
        state = _deepspeed(tagged(found.path))
    elif found.kind == CONVERTED:
        state = _listed(found.path)
        state.origin = found.info["source"]
        state.step = state.origin.get("step", 0)
    else:
        state = _weights(found.path, [found.path / setup.WEIGHTS])
        state.step = found.info["steps"]
        state.origin = {"stage": found.path.name, "step": state.step}
        if AVERAGE_WEIGHTS in found.manifest["files"]:
            for name, stretch in stretches(found.path / AVERAGE_WEIGHTS).items():
                state.tensors.add(AVERAGE, name, 0, stretch)
    state.whole, state.identify = found, lambda: identity(found)
    return state


def _require_whole(found: Artifact) -> None:
    """Raises UserError where a file is missing or of another size; digests are compared later."""
    wrong = artifact.problems(found, digests=False)
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def _checkpoint(found: Artifact) -> SavedState:
    """A checkpoint of Stretto's."""
    _require_whole(found)
    known = {found.path / rank_file(rank) for rank in range(found.info["world_size"])}
    foreign = sorted(set(found.path.glob("rank-*.safetensors")) - known)
    if foreign:
        raise UserError(f"{foreign[0]} is not in the manifest of this checkpoint: it is of another one, take it away.")
    tensors = SlicedTensors(sorted(known))
    shapes = _shapes(found)
    state = SavedState(found.path, "a checkpoint of Stretto's", lambda: found.fingerprint, tensors, shapes, whole=found)
    shared = _state(found)
    state.step, state.updates = found.info["step"], float(shared["updates"])
    state.common = {
        "global_steps": state.step,
        "skipped_steps": 0,
        "global_samples": shared["consumed"]["windows"],
        "lr_scheduler": {"last_batch_iteration": state.step, "last_epoch": state.step},
        "ds_version": found.info["versions"]["deepspeed"],
    }
    state.origin = {"predicts": found.info["config"]["model"]["field"], "step": state.step, "ranks": len(known)}
    for kind in (WEIGHTS, *state.kinds):
        if kind != "random":
            state.require(kind)
    return state


def _state(found: Artifact) -> dict[str, Any]:
    """What the ranks share, whose digest is looked at first, since what is read here is used."""
    path = found.path / checkpoint_folder.STATE
    if artifact.file_digest(path) != found.manifest["files"][checkpoint_folder.STATE]["sha256"]:
        raise UserError(f"{path} has changed: its digest is not the one in the manifest.")
    return json.loads(path.read_text())


def _shapes(found: Artifact) -> dict[str, tuple[int, ...]]:
    """Of the parameters. Checkpoints of the first version do not tell: the run that they lie in does."""
    if "shapes" in found.info:
        return {name: tuple(shape) for name, shape in found.info["shapes"].items()}
    stage = found.path.absolute().parent.parent
    try:
        with torch.device("meta"):
            model = StageSetup.read(stage.parent, stage.name).build_model()
    except UserError as error:
        raise UserError(
            f"{found.path} was written by an older version, which did not note the shapes of its parameters: convert "
            f"it where it lies in its run folder. {error}"
        ) from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _listed(folder: Path) -> SavedState:
    """The weights of a model in safetensors, as transformers lays them out."""
    if not (folder / INDEX).is_file():
        return _weights(folder, [folder / SINGLE])
    try:
        places = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        names = sorted(set(places.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder / INDEX} is damaged: it does not list files.") from None
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
            raise UserError(f"{folder / INDEX} lists {name!r}, which is no file beside it.")
    state = _weights(folder, [folder / name for name in names])
    for tensor, name in places.items():
        if tensor not in state.shapes and tensor not in state.buffers:
            raise UserError(f"{folder / name} lacks {tensor!r}, which {INDEX} says it holds: it is of another model.")
    return state


def _weights(path: Path, files: list[Path]) -> SavedState:
    """Weights alone, whole tensors by name."""
    tensors, shapes = SlicedTensors(), {}
    buffers: dict[str, Stretch] = {}
    for file in files:
        for name, stretch in stretches(file).items():
            if name in shapes or name in buffers:
                raise UserError(f"{file} holds {name!r}, which another file of {path} holds too.")
            if stretch.dtype == torch.int8:
                raise UserError(f"{file} holds weights of 8 bits, such as {name!r}: export the bundle without --int8.")
            if stretch.dtype.is_floating_point:
                shapes[name] = stretch.shape
                tensors.add(WEIGHTS, name, 0, stretch)
            else:
                buffers[name] = stretch
    return SavedState(path, "weights", lambda: weights_fingerprint(path), tensors, shapes, buffers)


def _deepspeed(folder: Path) -> SavedState:
    read = (
        deepspeed_universal.read_universal if deepspeed_universal.is_universal(folder) else deepspeed_files.read_native
    )
    try:
        state = read(folder)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ) as error:  # someone else's file: it may say anything
        raise UserError(
            f"{folder} is laid out otherwise than a checkpoint of DeepSpeed 0.19 ({type(error).__name__}: {error}): it "
            "is damaged, or of another version."
        ) from None
    state.require(WEIGHTS)
    return state
