"""DeepSpeed's universal checkpoints: each parameter's weights and optimizer state whole, in files of their own, which
an engine of any ZeRO stage (1 to 3) and any number of ranks loads.

The layout is that of `deepspeed/checkpoint/ds_to_universal.py` (0.19). `latest_universal` names a folder with:

    zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt   zero/optimizer_state.pt
    mp_rank_00_model_states.pt (stages 1 and 2), zero_pp_rank_0_mp_rank_00_model_states.pt (stage 3)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import UserError
from trainer.deepspeed_optimizer import STATE, common, settings
from trainer.optimizer import AVERAGE
from trainer.outputs import Output, text_output
from trainer.saved_state import SavedState
from trainer.tensor_files import WEIGHTS, SlicedTensors, Stretch
from trainer.torch_files import read_torch, write_torch
from trainer.zip_records import fingerprint

ZERO = "zero"
FP32 = "fp32"
OPTIMIZER_STATE = "optimizer_state.pt"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
INFO, VERSION = "universal_checkpoint_info", "universal_checkpoint_version"
NEWEST_VERSION = 0.4


def is_universal(folder: Path) -> bool:
    return (folder / ZERO / OPTIMIZER_STATE).is_file()


def read_universal(folder: Path) -> SavedState:
    """Raises UserError where files are missing or damaged, or the version is newer than is known here."""
    models = [folder / name for name in MODEL_STATES if (folder / name).is_file()]
    if not models:
        raise UserError(f"{folder / MODEL_STATES[0]} is missing.")
    first = read_torch(models[0])
    version = (first.get(INFO) or {}).get(VERSION, 0.0)
    if version > NEWEST_VERSION:
        raise UserError(f"{models[0]} has version {version} of universal checkpoints; {NEWEST_VERSION} is known here.")
    noted = {name: tuple(shape) for group in first.get("param_shapes") or [] for name, shape in group.items()}
    optimizer = read_torch(folder / ZERO / OPTIMIZER_STATE)
    tensors, paths = SlicedTensors(), [*models, folder / ZERO / OPTIMIZER_STATE]
    shapes: dict[str, tuple[int, ...]] = {}
    there = {path.name for path in (folder / ZERO).iterdir() if path.is_dir()}
    for name in noted.keys() - there:
        raise UserError(f"{folder / ZERO / name} is missing.")
    updates = None
    for name in [*noted, *sorted(there - noted.keys())]:
        files = {path.stem: path for path in sorted((folder / ZERO / name).glob("*.pt"))}
        if FP32 not in files:
            raise UserError(f"{folder / ZERO / name / FP32}.pt is missing.")
        if "step" in files:
            updates = read_torch(files.pop("step"))
        for kind, path in files.items():
            stretch = _param(path)
            shapes.setdefault(name, noted.get(name, stretch.shape))
            tensors.add(WEIGHTS if kind == FP32 else kind, name, 0, stretch.part(0, stretch.count))
        paths += files.values()
    state = SavedState(folder, "a universal checkpoint of DeepSpeed's", lambda: fingerprint(paths), tensors, shapes)
    state.step = int(first.get("global_steps", 0))
    state.buffers = {name: first["module"][name] for name in first.get("buffer_names") or [] if name in first["module"]}
    state.shared = dict(first.get("shared_params") or {})
    inner = optimizer.get(STATE) or {}
    if updates is None and inner.get("state"):
        updates = inner["state"][0].get("step")
    state.updates = updates.item() if isinstance(updates, Stretch) else updates
    state.groups = settings(optimizer.get("param_groups") or [])
    state.zipped = True
    state.common = common(first)
    state.origin = {"wrote": f"deepspeed {first.get('ds_version')}", "step": state.step}
    return state


def _param(path: Path) -> Stretch:
    found = read_torch(path)
    value = found.get("param") if isinstance(found, dict) else found
    if not isinstance(value, Stretch) or (isinstance(found, dict) and found.get("is_expert_param")):
        raise UserError(f"{path} does not hold the values of a parameter as a universal checkpoint does.")
    return value


def universal_outputs(state: SavedState, report: Callable[[int], None]) -> list[Output]:
    """The files of the universal checkpoint of `state`, the pointer to it last. Raises UserError where there is no
    optimizer's state, or a name cannot be one of a folder."""
    kinds = [kind for kind in state.kinds if kind != AVERAGE]
    if not kinds or state.updates is None:
        raise UserError(
            state.lacks or f"{state.path} holds no optimizer's state, without which no training goes on: use --to fp32."
        )
    tag = f"global_step{state.step}"
    there = state.tensors.kinds()
    outputs = []
    for name in state.shapes:
        if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            raise UserError(f"{state.path} holds a parameter called {name!r}, which no folder can be called.")
        own = [WEIGHTS, *kinds] if there[name] - {WEIGHTS} else [WEIGHTS]
        for kind in own:
            state.require(kind, [name])
            file = f"{tag}/{ZERO}/{name}/{FP32 if kind == WEIGHTS else kind}.pt"
            outputs.append(_tensor(state, kind, name, file, report))
        if len(own) > 1:
            outputs.append(_plain(f"{tag}/{ZERO}/{name}/step.pt", _step(state)))
    outputs.append(_plain(f"{tag}/{ZERO}/{OPTIMIZER_STATE}", _optimizer_state(state)))
    outputs += [_models(state, f"{tag}/{name}", report) for name in MODEL_STATES]
    return [*outputs, text_output("latest_universal", tag)]


def _tensor(state: SavedState, kind: str, name: str, file: str, report: Callable[[int], None]) -> Output:
    nbytes = 4 * math.prod(state.shapes[name])

    def write(path: Path) -> dict[str, Any]:
        flat = torch.empty(nbytes // 4)
        state.fill(kind, name, 0, flat)
        described = write_torch(path, {"param": flat.view(state.shapes[name])})
        report(2 * nbytes)
        return described

    return Output(file, nbytes, write)


def _plain(name: str, value: Any) -> Output:
    return Output(name, 0, lambda path: write_torch(path, value))


def _models(state: SavedState, name: str, report: Callable[[int], None]) -> Output:
    """Buffers are read when the file is written: only then is it known that there is room for them."""
    nbytes = sum(stretch.nbytes for stretch in state.buffers.values())

    def write(path: Path) -> dict[str, Any]:
        described = write_torch(path, _model_states(state))
        report(2 * nbytes)
        return described

    return Output(name, nbytes, write)


def _step(state: SavedState) -> Any:
    """As torch's optimizers keep it, which must have fp32; those of DeepSpeed's count in plain numbers."""
    return torch.tensor(float(state.updates)) if isinstance(state.updates, float | Tensor) else state.updates


def _optimizer_state(state: SavedState) -> dict[str, Any]:
    """Engines of stages 1 and 2 load as many groups as are listed here, and leave out the rest without a word; one of
    stage 3 takes the first one's settings for all. An engine cannot have more groups than parameters."""
    rest: list[dict[str, Any]] = [{} for _ in range(len(state.shapes) - len(state.groups))]
    groups = [{**group, "params": []} for group in [*state.groups, *rest]]
    return {
        "ds_version": state.common.get("ds_version"),
        "param_groups": groups,
        STATE: {"state": {0: {"step": _step(state)}}, "param_groups": groups},
    }


def _model_states(state: SavedState) -> dict[str, Any]:
    """What an engine looks at beside `zero`."""
    buffers = {}
    for name, stretch in state.buffers.items():
        flat = torch.empty(stretch.count, dtype=stretch.dtype)
        stretch.read(0, flat)
        buffers[name] = flat.view(stretch.shape)
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [{name: torch.Size(shape) for name, shape in state.shapes.items()}],
        "shared_params": state.shared,
        "dp_world_size": 1,
        "mp_world_size": 1,
        **state.common,
        INFO: {VERSION: NEWEST_VERSION},
    }
