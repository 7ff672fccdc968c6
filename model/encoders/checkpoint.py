"""Checkpoint files of other libraries, read as tensors alone and put into transformers' models."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.encoders.pretrained import OWN_FILES, ready, weights_key
from model.errors import UserError

# Training scripts leave numbers of numpy beside the weights (a best score). They hold no code: a type and some bytes.
_SCALAR: Any = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]


def read_tensors(kind: str, file: Path) -> dict[str, Tensor]:
    """The state dict in `file`, which the recipe names for a `kind` of encoder. Raises as `read_state_dict`."""
    return read_state_dict(file, weights_key(kind), OWN_FILES[kind])


def read_state_dict(file: Path, key: str, hint: str) -> dict[str, Tensor]:
    """The state dict in `file`: safetensors, or what torch saves, at its top or under "state_dict".

    Nothing but tensors, containers and numbers is unpickled. Raises UserError for a file that is not there, is damaged,
    holds anything else, or no state dict; it begins with `key` and ends with `hint`, which says what to give.
    """
    if not file.is_file():
        raise UserError(f"{key}: there is no file {file}.\n{hint}")
    zipped = zipfile.is_zipfile(file)
    with file.open("rb") as start:
        if file.suffix != ".safetensors" and not zipped and start.read(1) != pickle.PROTO:
            raise UserError(f"{key}: {file} is no checkpoint.\n{hint}")
    try:
        found: Any
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            # Mapped: the state of an optimizer beside the weights is not read.
            with torch.serialization.safe_globals(NUMBERS):
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(
            f"{key}: {file} holds more than tensors, so that opening it could run code: it was not loaded.\n{hint}"
        ) from None
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{key}: {file} is damaged ({type(error).__name__}).\n{hint}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}: {file} holds no state dict.\n{hint}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def fill(model: nn.Module, tensors: dict[str, Tensor], kind: str, file: Path) -> Any:
    """`model` with the weights `tensors`, by its own names, ready for inference; it has no use for some of them.

    Raises UserError where they do not cover the whole model.
    """
    # Integers are positions that a model counts out by itself: libraries differ in whether they store them.
    own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    wrong = [name for name, value in own.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong:
        raise UserError(
            f"{weights_key(kind)}: {file} is no checkpoint of this kind: {len(wrong)} of {len(own)} tensors are "
            f"missing or of another shape, among them {wrong[0]}.\n{OWN_FILES[kind]}"
        )
    model.load_state_dict({name: tensors[name] for name in own}, strict=False)
    return ready(model)
