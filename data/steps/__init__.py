"""Preprocessing steps of the tokeniser, one class each, chosen by `kind`. A new one is a new file, a line in the table
below and its keys in `data/steps/config.py`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.steps.config import OwnStepConfig, StepConfig, VocalsConfig
from model.errors import UserError

if TYPE_CHECKING:
    from data.steps.base import Step

# module:class, imported when asked for: none should wait for the libraries of another.
STEPS = {
    "vocals": "data.steps.vocals:Vocals",
    "chroma": "data.steps.chroma:Melody",
    "features": "data.steps.features:Features",
    "captions": "data.steps.captions:Captions",
}


def load_steps(configs: Sequence[StepConfig]) -> list[Step]:
    """The steps that a recipe asks for, in their order. Raises UserError for one that cannot be had here."""
    return [_load(config, f"tokens.steps.{number}") for number, config in enumerate(configs)]


def steps_digests(configs: Sequence[StepConfig]) -> dict[str, str]:
    """What changes with the bytes that steps are made of beside their keys: weights, and the files of a user's own.

    Raises UserError for a step that cannot be had here; imports no torch for those of our own.
    """
    digests = {}
    for number, config in enumerate(configs):
        key = f"tokens.steps.{number}"
        if isinstance(config, VocalsConfig):
            from data.steps.demucs_weights import weights_digest

            digests[f"the weights of {key}"] = weights_digest(config.model, config.weights)
        elif isinstance(config, OwnStepConfig):
            from model.artifact import file_digest

            digests[f"the code of {key}"] = file_digest(_source(config.kind.split(":")[0], key))
    return digests


def _load(config: StepConfig, key: str) -> Step:
    module, _, name = STEPS.get(config.kind, config.kind).partition(":")
    if isinstance(config, OwnStepConfig):
        _source(module, key)
    kind = getattr(import_module(module), name, None)
    settings = config.model_dump(exclude={"kind"})
    if kind is None:
        raise UserError(f"{key}.kind is {config.kind!r}: the module {module} has no {name}.")
    _check_settings(kind, settings, f"{key} ({config.kind})")
    return kind(**settings)


def _source(module: str, key: str) -> Path:
    """The file of a user's module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"{key}.kind names the module {module}, which Python does not find: install it, or add its folder to "
            "PYTHONPATH."
        )
    return Path(spec.origin)


def _check_settings(kind: Any, settings: dict[str, Any], key: str) -> None:
    try:
        inspect.signature(kind).bind(**settings)
    except TypeError as error:
        raise UserError(f"{key}: its keys are those of {kind.__name__}{inspect.signature(kind)}: {error}.") from None
