"""A bundle on the disk: what its files are called, whether it is whole, and a stage read from it.

All weights are safetensors. Anything else, a pickle above all, is refused and never loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import artifact
from model.artifact import Artifact
from model.config import StageModelConfig
from model.errors import UserError
from model.fields import TokenField
from model.int8 import dequantised
from model.stage import StageTransformer, build_stage

KIND = "bundle"
QUANTIZERS = "quantizers.safetensors"
CODEC = Path("encoders/codec")
JOINT = Path("encoders/joint")


def stage_file(name: str) -> str:
    """What holds the weights of stage `name`."""
    return f"{name}.safetensors"


def open_bundle(path: Path, verify: bool) -> Artifact:
    """The bundle at `path`. With `verify` every file is read and its digest compared; without, its size alone.

    Raises UserError, which names the file, where it is no bundle, or not the one that was written.
    """
    bundle = artifact.read(path, KIND)
    changed = not artifact.unchanged(bundle.manifest)
    wrong = [f"{path / artifact.MANIFEST} has changed"] if changed else artifact.problems(bundle, digests=verify)
    if wrong:
        raise UserError(f"The bundle {path} is not whole: {wrong[0]}. Copy or export it again.")
    return bundle


@contextlib.contextmanager
def refusing_others(path: Path) -> Iterator[None]:
    """Raises UserError where a file that is read meanwhile, `path` or one below it, is not safetensors."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path} does not read as safetensors: it is damaged, or something else, such as a pickle, which is never "
            f"loaded. ({error})"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is none."""
    with refusing_others(path):
        return load_file(path)


def read_fields(info: Mapping[str, Any]) -> dict[str, TokenField]:
    """The token fields of a bundle whose manifest says `info`."""
    return {name: TokenField.from_json(value) for name, value in info["fields"].items()}


def load_stage(folder: Path, info: Mapping[str, Any], name: str, quantizers: dict[str, Tensor]) -> StageTransformer:
    """Stage `name` of the bundle in `folder`, whose manifest says `info`, in fp32 on the CPU, whatever its file has.

    Raises UserError where the file is not safetensors, or its tensors are not those of the stage.
    """
    path = folder / stage_file(name)
    stage = build_stage(StageModelConfig.model_validate(info["stages"][name]), read_fields(info), quantizers)
    tensors = dequantised(read_tensors(path))
    there = {key: value.shape for key, value in tensors.items()}
    expected = {key: value.shape for key, value in stage.state_dict().items()}
    for key in sorted({*there, *expected}):
        if there.get(key) != expected.get(key):
            raise UserError(
                f"{path} holds another model than its manifest says: {key} is {_shape(there.get(key))}, "
                f"{_shape(expected.get(key))} expected."
            )
    stage.load_state_dict(tensors)
    return stage


def _shape(shape: Any) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape))
