"""Checkpoints that DeepSpeed's engines write, read without DeepSpeed: any ZeRO stage, any number of ranks.

The layouts are those of `deepspeed/checkpoint/ds_to_universal.py` and `deepspeed/utils/zero_to_fp32.py` (0.19).
ZeRO-1 and 2 keep groups of parameters end to end, cut into as many parts as there are ranks, each file with a list of
what lies where. ZeRO-3 cuts each parameter. Without ZeRO one file has everything, and the optimizer's state by number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from trainer.saved_state import SavedState
from trainer.tensor_files import BLOCK_BYTES, WEIGHTS, SlicedTensors, Stretch, plain
from trainer.torch_files import read_torch
from trainer.zip_records import fingerprint

OPTIMIZER = re.compile(r"(|bf16_|fp16_)zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
MODEL_FILES = "*_model_states.pt"
STATE = "optimizer_state_dict"
UNPARTITIONED = -1
"""In place of a rank: the one file of the model below ZeRO-3."""
FP32_PARTS, FP32_SUBGROUPS = "single_partition_of_fp32_groups", "fp32_flat_groups"
COMMON = ("global_steps", "skipped_steps", "global_samples", "lr_scheduler", "ds_version")


def tagged(folder: Path) -> Path:
    """The checkpoint that a folder of DeepSpeed's names as its latest, or the folder itself."""
    for pointer in ("latest", "latest_universal"):
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text(errors="replace").strip()
            if not re.fullmatch(r"[\w.-]+", tag) or set(tag) == {"."} or not (folder / tag).is_dir():
                raise UserError(f"{folder / pointer} names {tag[:60]!r}, which is no folder beside it.")
            return folder / tag
    return folder


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
        _check_ranks(folder, models, optimizers, first)
        _add_zero(state, models, optimizers, first)
    else:
        _add_plain(state, models[0], first)
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


def _check_ranks(folder: Path, models: list[Path], optimizers: list[Path], first: dict[str, Any]) -> None:
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
    found = MODEL.fullmatch(models[0].name)
    return found is not None and found[1] is None


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


# ZeRO


def _add_zero(state: SavedState, models: list[Path], paths: list[Path], first: dict[str, Any]) -> None:
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
        flat, step = _kept(base, number, weights, step)
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
        flat, step = _kept(file[STATE], number, weights, step)
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


def _kept(base: dict[str, Any], number: int, weights: Stretch, step: Any) -> tuple[dict[str, Stretch], Any]:
    """The flat tensors of a group, and the step that its optimizer has come to."""
    own = base["state"].get(number, {})
    flat = {kind: value for kind, value in own.items() if isinstance(value, Stretch) and value.shape}
    if "step" in own:
        step = _value(own["step"])
    return {WEIGHTS: weights, **flat}, step


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


# Without ZeRO


def _add_plain(state: SavedState, path: Path, first: dict[str, Any]) -> None:
    """One file has everything: the model's weights by name, the optimizer's state in the order of its parameters."""
    for name in state.shapes:
        state.tensors.add(WEIGHTS, name, 0, first["module"][name])
    optimizer = first.get("optimizer")
    if optimizer is None:
        return
    inner = optimizer.get(STATE, optimizer)
    names = _names(state, optimizer, inner)
    rounded = "fp32_groups" in optimizer or "fp32_groups_flat" in optimizer
    if names is None or not (rounded or _told(state, inner)):
        state.lacks = (
            f"{path} keeps the optimizer's state by number, in {len(inner['param_groups'])} groups: which parameter is "
            "which cannot be told. Save it under ZeRO, or give the optimizer model.named_parameters()."
        )
        if rounded:
            raise UserError(state.lacks)
        return
    state.groups = settings(inner["param_groups"])
    if rounded:  # the module's weights are, but for frozen ones
        _keep_frozen(state, first, {name for members in names for name in members})
    for kind, name, stretch in _numbered(state, optimizer, inner, names):
        if kind == "step":
            state.updates = _value(stretch)
        elif stretch.shape not in (state.shapes[name], (math.prod(state.shapes[name]),)):
            raise UserError(
                f"{path} keeps the optimizer's state in an order that is not its weights': {name!r} differs."
            )
        else:
            state.tensors.add(kind, name, 0, stretch.part(0, stretch.count))
    if rounded and not _named(inner):
        _check_order(state, path, first["module"])


def _named(inner: dict[str, Any]) -> bool:
    return all("param_names" in group for group in inner["param_groups"])


def _told(state: SavedState, inner: dict[str, Any]) -> bool:
    """Whether it is certain without fp32 weights which parameter is which: they have names, or each its own shape."""
    return _named(inner) or len(set(state.shapes.values())) == len(state.shapes)


def _keep_frozen(state: SavedState, first: dict[str, Any], optimized: set[str]) -> None:
    state.tensors = SlicedTensors()
    for name in state.shapes.keys() - optimized:
        state.tensors.add(WEIGHTS, name, 0, first["module"][name])


def _check_order(state: SavedState, path: Path, module: dict[str, Stretch]) -> None:
    """Where the order of the parameters is a guess: the fp32 weights must be what the module's were rounded from.
    Raises UserError where they are not."""
    for name, rounded in module.items():
        most = BLOCK_BYTES // torch.float32.itemsize
        for start in range(0, rounded.count if name in state.shapes else 0, most):
            there = torch.empty(min(most, rounded.count - start), dtype=rounded.dtype)
            rounded.read(start, there)
            found = torch.empty(len(there))
            state.tensors.read(WEIGHTS, name, start, found)
            if not torch.equal(found.to(there.dtype).view(torch.uint8), there.view(torch.uint8)):
                raise UserError(
                    f"{path} is damaged, or its optimizer has the parameters in another order than the model: the fp32 "
                    f"weights at the place of {name!r} are others. Save it under ZeRO, or give the optimizer "
                    "model.named_parameters()."
                )


def _names(state: SavedState, optimizer: dict[str, Any], inner: dict[str, Any]) -> list[list[str]] | None:
    """The parameters of each group, in order; None where that cannot be told, as where some of one group are frozen."""
    groups, flat = inner["param_groups"], optimizer.get("fp32_groups_flat")
    if _named(inner):
        return [list(group["param_names"]) for group in groups]
    if len(groups) > 1:
        return None
    if flat is not None:  # in place of the group's parameters
        whole = flat[0].count == sum(map(math.prod, state.shapes.values()))
    else:
        whole = len(groups[0]["params"]) == len(state.shapes)
    return [list(state.shapes)] if whole else None


def _numbered(
    state: SavedState, optimizer: dict[str, Any], inner: dict[str, Any], names: list[list[str]]
) -> Iterator[tuple[str, str, Any]]:
    """Kind, parameter and value of all that the optimizer keeps, its fp32 weights included."""
    flat = optimizer.get("fp32_groups_flat")
    if flat is not None:  # DeepSpeed's fused optimizers keep a group end to end
        for number, (members, weights) in enumerate(zip(names, flat, strict=True)):
            kept, step = _kept(inner, number, weights, None)
            yield "step", members[0], step
            start = 0
            for name in members:
                count = math.prod(state.shapes[name])
                yield from ((kind, name, stretch.part(start, count)) for kind, stretch in kept.items())
                start += count
        return
    for members, weights in zip(names, optimizer.get("fp32_groups", []), strict=False):
        yield from ((WEIGHTS, name, stretch) for name, stretch in zip(members, weights, strict=True))
    for group, members in zip(inner["param_groups"], names, strict=True):
        for number, name in zip(group["params"], members, strict=True):
            own = inner["state"].get(number, {})
            yield from (
                (kind, name, value) for kind, value in own.items() if isinstance(value, Stretch) or kind == "step"
            )


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of each of the optimizer's groups that are plain values."""
    return [
        plain({key: value for key, value in group.items() if key not in ("params", "param_names")}) for group in groups
    ]


def common(first: dict[str, Any]) -> dict[str, Any]:
    """What an engine keeps beside the tensors, in plain values."""
    return plain({name: first.get(name) for name in COMMON})


def _value(step: Any) -> Any:
    return step.item() if isinstance(step, Stretch) else step
