"""Where Demucs' weights are, and reading them without running anything that they contain."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from model.artifact import file_digest, fingerprint
from model.errors import UserError

KEY = "tokens.steps (kind vocals)"
CLASSES = ("demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs", "demucs.demucs.Demucs")
"""What the model of a file may be."""
QUANTIZED = "__quantized"
"""The key by which Demucs marks weights that were compressed with diffq."""


@dataclass(frozen=True)
class DemucsFiles:
    """The models whose mean separates the sources."""

    models: tuple[Path, ...]
    weights: list[list[float]] | None = None
    """How much each model counts for each source; equally when not given."""
    segment: float | None = None
    """Seconds each model hears at a time, where it is not what the model itself says."""


def find_weights(model: str, weights: str | None) -> DemucsFiles:
    """The files of the Demucs model called `model`.

    `weights` is one file, or a folder with the files under the names that Demucs gives them; where it is None they are
    in the cache that Demucs fills. The network is never asked. Raises UserError where they are not there, or where the
    package `demucs` is missing.
    """
    package = _package()
    path = Path(weights).expanduser() if weights else None
    if path and path.is_file():
        return DemucsFiles((path,))
    for folder in [path] if path else _caches(model):
        found = _in_folder(folder, model, package)
        if found:
            return found
    repository = _repository(model)
    place = f"{path} has no files" if path else "there are no weights in the cache"
    raise UserError(
        f"{KEY}: {place} of the Demucs model {model!r}.\n"
        f"Fetch them once with `hf download {repository}`, or name with weights a folder that has its files."
    )


def weights_digest(model: str, weights: str | None) -> str:
    """16 hex digits that change with the bytes of the weights. Raises UserError where `find_weights` does."""
    found = find_weights(model, weights)
    return fingerprint([file_digest(file) for file in found.models], found.weights, found.segment)


def read_package(path: Path) -> dict[str, Any]:
    """Class name (one of CLASSES), args, kwargs and state of the model in a `.safetensors` or `.th` file.

    The class and the tensors are all that is taken from a `.th` file, which is a pickle: anything else that it wants
    to make or call is refused. Raises UserError for a file that is damaged, quantised, or not one model of Demucs.
    """
    try:
        package = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{KEY}: {path} does not read as weights of Demucs; nothing in it was run ({line[:200]})."
        ) from None
    if QUANTIZED in package["state"]:
        raise UserError(f"{KEY}: {path} holds weights compressed with diffq: take a model without _q in its name.")
    if package["klass"] not in CLASSES:
        raise UserError(f"{KEY}: {path} holds a {package['klass']!r}: it can be {', '.join(CLASSES)}.")
    return package


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The form in which Demucs keeps its models on the Hugging Face hub since 4.1."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if "structure" in said:  # of packed integers
        state[QUANTIZED] = True
    args, kwargs = (json.loads(said[name], object_hook=_fraction) for name in ("args", "kwargs"))
    return {"klass": said["klass"], "args": args, "kwargs": kwargs, "state": state}


def _fraction(value: dict[str, Any]) -> Any:
    return Fraction(value["numerator"], value["denominator"]) if value.get("_type") == "fraction" else value


def _read_pickle(path: Path) -> dict[str, Any]:
    """The older form. Beside tensors and plain values it may have fractions, numpy's numbers, and the class by name."""
    import numpy as np
    import torch

    allowed: list[Any] = [
        # A name stands for the class of the same name: no object of it can be made while unpickling.
        *((name, name) for name in CLASSES),
        (Fraction, "fractions.Fraction"),
        (np.core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        (np.dtype, "numpy.dtype"),
        *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64", "bool")),
    ]
    with torch.serialization.safe_globals(allowed):
        package = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(package["state"], Mapping):
        raise TypeError("its state is no mapping")
    return {name: package[name] for name in ("klass", "args", "kwargs", "state")}


def _package() -> Path:
    spec = find_spec("demucs")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{KEY} needs a package that is missing: pip install 'stretto[vocals]'")
    return Path(spec.submodule_search_locations[0])


def _repository(model: str) -> str:
    """Where Demucs publishes a model on the Hugging Face hub."""
    kind, _, rest = model.partition("_")
    return "adefossez/" + (f"HTDemucs{rest and f'-{rest}'}" if kind == "htdemucs" else f"Demucs-{model}")


def _caches(model: str) -> list[Path]:
    """The folders Demucs downloads to: the Hugging Face cache, and before 4.1 that of torch.hub."""
    import torch
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    caches = [Path(torch.hub.get_dir()) / "checkpoints"]
    try:
        return [Path(snapshot_download(_repository(model), local_files_only=True)), *caches]
    except (HFValidationError, LocalEntryNotFoundError):
        return caches


def _in_folder(folder: Path, model: str, package: Path) -> DemucsFiles | None:
    """The files in `folder` that the list of a model names; the package has the lists of the published models."""
    lists = [path for path in (folder / f"{model}.yaml", package / "remote" / f"{model}.yaml") if path.is_file()]
    if not lists:
        return None
    listed = yaml.safe_load(lists[0].read_text())
    files = [_file(folder, signature) for signature in listed["models"]]
    if None in files:
        return None
    return DemucsFiles(tuple(path for path in files if path), listed.get("weights"), listed.get("segment"))


def _file(folder: Path, signature: str) -> Path | None:
    """The file of one model: SIGNATURE.safetensors, SIGNATURE.th, or with its checksum SIGNATURE-0123abcd.th."""
    for pattern in (f"{signature}.safetensors", f"{signature}.th", f"{signature}-*.th"):
        for path in sorted(folder.glob(pattern)):
            return path
    return None
