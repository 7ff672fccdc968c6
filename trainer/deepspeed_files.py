"""Checkpoints that DeepSpeed's engines write, read without DeepSpeed: any ZeRO stage, any number of ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.deepspeed_optimizer import common
from trainer.deepspeed_plain import add_plain
from trainer.deepspeed_zero import add_zero, check_ranks
from trainer.saved_state import SavedState
from trainer.tensor_files import SlicedTensors, Stretch
from trainer.torch_files import read_torch
from trainer.zip_records import fingerprint

OPTIMIZER = re.compile(r"(|bf16_|fp16_)zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
MODEL_FILES = "*_model_states.pt"
UNPARTITIONED = -1
"""In place of a rank: the one file of the model below ZeRO-3."""


def is_deepspeed(folder: Path) -> bool:
    return next(folder.glob(MODEL_FILES), None) is not None


def read_native(folder: Path) -> SavedState:
    """What `engine.save_checkpoint` left in `folder`. Raises UserError where files are missing, damaged, of several
    checkpoints, or of a kind of training that is not known here."""
    models, optimizers = _files(folder)
    if not models:
        raise UserError(f"{folder} lacks the model states of its ranks.")
    first = read_torch(models[0])
    if not isinstance(first, dict) or "module" not in first:
        raise UserError(f"{models[0]} is no file of a DeepSpeed engine's: it holds no module.")
    if any(first.get("num_experts") or []):
        raise UserError(f"{folder} is of a mixture of experts, which is not converted.")
    state = SavedState(
        folder,
        "a checkpoint of DeepSpeed's",
        lambda: fingerprint([*models, *optimizers]),
        SlicedTensors(),
        _shapes(first),
        _buffers(first),
        _shared(first),
        step=int(first.get("global_steps", 0)),
        common=common(first),
        zipped=True,
    )
    _check_alike(models, first)
    if first.get("param_shapes"):
        check_ranks(folder, models, optimizers, first)
        add_zero(state, models, optimizers, first)
    else:
        add_plain(state, models[0], first)
    state.origin = {"wrote": f"deepspeed {first.get('ds_version')}", "step": state.step, "ranks": len(optimizers) or 1}
    return state


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of the model's and of the optimizer's state, by rank."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    precisions = set()
    for path in sorted(folder.glob("*_states.pt")):
        model, optimizer = MODEL.fullmatch(path.name), OPTIMIZER.fullmatch(path.name)
        found = model or optimizer
        if found is None or int(found.groups()[-1]) > 0:
            raise UserError(f"{path}: tensor and pipeline parallelism and experts are not converted.")
        if model:
            models[UNPARTITIONED if model[1] is None else int(model[1])] = path
        elif optimizer:
            precisions.add(optimizer[1])
            optimizers[int(optimizer[2])] = path
    if len(precisions) > 1 or (UNPARTITIONED in models and len(models) > 1):
        raise UserError(f"{folder} holds files of several checkpoints, of other precisions or ZeRO stages: part them.")
    for kind, files in (("model", models), ("optimizer", optimizers)):
        missing = [rank for rank in range(max(files, default=0)) if rank not in files]
        if missing:
            raise UserError(f"{folder} lacks the {kind} states of rank {missing[0]}, which later ranks have.")
    return [path for _, path in sorted(models.items())], [path for _, path in sorted(optimizers.items())]


def _check_alike(models: list[Path], first: dict[str, Any]) -> None:
    """All ranks' files of ZeRO-3 tell of one model at one step."""
    for path in models[1:]:
        other = read_torch(path)
        for key in ("param_shapes", "global_steps", "dp_world_size", "ds_version"):
            if other.get(key) != first.get(key):
                raise UserError(f"{path} has other {key} than {models[0].name}: they are of different checkpoints.")


def _shapes(first: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if first.get("param_shapes"):
        return {name: tuple(shape) for group in first["param_shapes"] for name, shape in group.items()}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    shapes = {}
    for name, stretch in first["module"].items():
        if name not in first.get("buffer_names", []) and (stretch.offset, stretch.shape) not in seen:
            seen[stretch.offset, stretch.shape] = name
            shapes[name] = stretch.shape
    return shapes


def _buffers(first: dict[str, Any]) -> dict[str, Stretch]:
    return {name: first["module"][name] for name in first.get("buffer_names") or [] if name in first["module"]}


def _shared(first: dict[str, Any]) -> dict[str, str]:
    """Tied parameters: further names of each."""
    if first.get("shared_params") is not None:
        return dict(first["shared_params"])
    own = {(first["module"][name].offset, shape): name for name, shape in _shapes(first).items()}
    rest = first["module"].keys() - set(own.values()) - set(first.get("buffer_names") or [])
    return {name: own[first["module"][name].offset, first["module"][name].shape] for name in sorted(rest)}
