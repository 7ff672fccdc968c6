"""The part of each rank in the checkpoints of DeepSpeed's engines under ZeRO-1, 2 and 3.

The layouts are those of `deepspeed/checkpoint/ds_to_universal.py` and `deepspeed/utils/zero_to_fp32.py` (0.19).
ZeRO-1 and 2 keep groups of parameters end to end, cut into as many parts as there are ranks, each file with a list of
what lies where. ZeRO-3 cuts each parameter.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.deepspeed_optimizer import STATE, kept, settings
from trainer.saved_state import SavedState
from trainer.tensor_files import WEIGHTS, Stretch
from trainer.torch_files import read_torch

FP32_PARTS, FP32_SUBGROUPS = "single_partition_of_fp32_groups", "fp32_flat_groups"


def check_ranks(folder: Path, models: list[Path], optimizers: list[Path], first: dict[str, Any]) -> None:
    """Each rank has left its files."""
    ranks = first["dp_world_size"]
    expected = 1 if _unpartitioned(models) else ranks
    for kind, found, count in (("model", models, expected), ("optimizer", optimizers, ranks)):
        if len(found) != count:
            raise UserError(
                f"{folder} has {len(found)} files of {kind} states where {ranks} ranks have left {count}: some are "
                "missing, or are of another checkpoint."
            )


def _unpartitioned(models: list[Path]) -> bool:
    """Whether one file has the whole model, as below ZeRO-3. Its name tells: `ds_config` may be a path or say less."""
    return models[0].name.startswith("mp_rank_")


def add_zero(state: SavedState, models: list[Path], paths: list[Path], first: dict[str, Any]) -> None:
    """ZeRO-1, 2 and 3: each rank's file has its part."""
    files = [_optimizer(path) for path in paths]
    steps = {}
    done: Counter[tuple[str, str]] = Counter()
    for rank, (path, file) in enumerate(zip(paths, files, strict=True)):
        partitions = file.get("partition_count")
        count = max(partitions) if isinstance(partitions, list) else partitions
        if count != len(paths):
            raise UserError(
                f"{path} is one of {count}, and {state.path} has {len(paths)} optimizer files: some are missing, or "
                "are of another checkpoint."
            )
        if FP32_SUBGROUPS in file:
            steps[path] = _add_partitioned(state, path, file, (rank, len(paths)), first["param_shapes"])
        else:
            steps[path] = _add_flattened(state, path, file, done)
    for path, step in steps.items():
        if step != steps[paths[0]]:
            raise UserError(f"{path} is of update {step} and {paths[0].name} of {steps[paths[0]]}: two checkpoints.")
    _add_frozen(state, models, first)
    base = files[0].get("base_optimizer_state") or files[0][STATE]
    state.groups = settings(base["param_groups"])
    state.updates = steps[paths[0]]


def _optimizer(path: Path) -> dict[str, Any]:
    found = read_torch(path)
    file = found.get(STATE) if isinstance(found, dict) else None
    if not isinstance(file, dict) or not (FP32_PARTS in file or FP32_SUBGROUPS in file):
        raise UserError(
            f"{path} is no file of a ZeRO optimizer's, or of a version of DeepSpeed that is not known here."
        )
    return file


def _add_flattened(state: SavedState, path: Path, file: dict[str, Any], done: Counter[tuple[str, str]]) -> Any:
    """ZeRO-1 and 2. Parts of a parameter follow each other by rank; `done` counts the elements of earlier ones."""
    mappings, base = file.get("param_slice_mappings"), file.get("base_optimizer_state")
    if mappings is None or not isinstance(base, dict):
        raise UserError(f"{path} does not say which parameters it holds: its version of DeepSpeed is not known here.")
    step = None
    for number, (mapping, weights) in enumerate(zip(mappings, file[FP32_PARTS], strict=True)):
        flat, step = kept(base, number, weights, step)
        for name, where in mapping.items():
            for kind, stretch in flat.items():
                state.tensors.add(kind, name, done[kind, name], stretch.part(where.start, where.numel))
                done[kind, name] += where.numel
    return step


def _add_partitioned(
    state: SavedState,
    path: Path,
    file: dict[str, Any],
    place: tuple[int, int],
    groups: list[dict[str, tuple[int, ...]]],
) -> Any:
    """ZeRO-3. Each parameter is cut into equal parts, the last one padded, for each rank: `place` = (rank, ranks)."""
    (rank, ranks), step = place, None
    for number, (shapes, weights) in enumerate(zip(groups, file[FP32_SUBGROUPS], strict=True)):
        flat, step = kept(file[STATE], number, weights, step)
        offset = 0
        for name, shape in shapes.items():
            whole = math.prod(shape)
            size = math.ceil(whole / ranks)
            count = max(0, min(size, whole - rank * size))
            for kind, stretch in flat.items():
                if stretch.count < offset + count:
                    raise UserError(
                        f"{path} holds too little of {name!r}: it is of another model, or of weights that were "
                        "offloaded to NVMe, which are not converted."
                    )
                if count:
                    state.tensors.add(kind, name, rank * size, stretch.part(offset, count))
            offset += size
    return step


def _add_frozen(state: SavedState, models: list[Path], first: dict[str, Any]) -> None:
    """What the optimizer has no part in: whole in the first file, or cut among all of them under ZeRO-3. ZeRO-1 keeps
    it in the module alone."""
    noted = first.get("frozen_param_shapes")
    if noted is None and _unpartitioned(models):
        known = {*state.shapes, *state.buffers, *state.shared}
        for name, value in first["module"].items():
            if name not in known and isinstance(value, Stretch):
                state.shapes[name] = value.shape
                state.tensors.add(WEIGHTS, name, 0, value)
    for name, shape in (noted or {}).items():
        state.shapes[name] = tuple(shape)
        if len(models) == 1:
            state.tensors.add(WEIGHTS, name, 0, first["frozen_param_fragments"][name])
            continue
        left = math.prod(shape)
        for rank, path in enumerate(models):
            part = read_torch(path)["frozen_param_fragments"][name]
            count = min(left, part.count)
            state.tensors.add(WEIGHTS, name, rank * part.count, part.part(0, count))
            left -= count
    # With exclude_frozen_parameters, tied ones are still listed.
    state.shared = {name: source for name, source in state.shared.items() if source in state.shapes}
