"""The single file of DeepSpeed's engines without ZeRO: the weights by name, the optimizer's state in the order of its
parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from trainer.deepspeed_optimizer import STATE, kept, settings, step_value
from trainer.saved_state import SavedState
from trainer.tensor_files import BLOCK_BYTES, WEIGHTS, SlicedTensors, Stretch


def add_plain(state: SavedState, path: Path, first: dict[str, Any]) -> None:
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
            state.updates = step_value(stretch)
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
            flats, step = kept(inner, number, weights, None)
            yield "step", members[0], step
            start = 0
            for name in members:
                count = math.prod(state.shapes[name])
                yield from ((kind, name, stretch.part(start, count)) for kind, stretch in flats.items())
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
