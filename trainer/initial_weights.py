"""Weights from elsewhere that a new training begins with (`train.init_from`): fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model import artifact
from model.errors import UserError
from trainer.agreement import alone, raise_alike, said
from trainer.engine import Engine
from trainer.optimizer import AVERAGE
from trainer.saved_sources import open_saved
from trainer.saved_state import SavedState
from trainer.tensor_files import WEIGHTS

log = logging.getLogger(__name__)

NAMED = 5
"""Names of parameters in a line of the log."""


@dataclass(frozen=True)
class Matched:
    """How the parameters of a stage compare with those at `path`."""

    path: str
    parameters: list[str]
    """That are the same in name and shape, and are taken."""
    missing: list[str]
    """That are not there, and keep their fresh weights."""
    other_shape: dict[str, str]
    """That are there in another shape, and keep their fresh weights."""
    unused: list[str]
    """That are there alone."""

    @classmethod
    def of(cls, state: SavedState, shapes: dict[str, tuple[int, ...]]) -> Matched:
        """Raises UserError where nothing matches."""
        there = {name: shape for name, (_, shape) in state.whole_weights().items() if name not in state.buffers}
        same = [name for name, shape in shapes.items() if there.get(name) == shape]
        other = {
            name: f"{list(there[name])} there, {list(shape)} here"
            for name, shape in shapes.items()
            if name in there and there[name] != shape
        }
        if not same:
            raise UserError(
                f"train.init_from: none of the {len(there)} parameters in {state.path} has name and shape of one of "
                f"this stage's {len(shapes)}: there it is {_some(list(there))}, here {_some(list(shapes))}."
            )
        missing = [name for name in shapes if name not in there]
        return cls(str(state.path), same, missing, other, [name for name in there if name not in shapes])

    def lines(self) -> list[str]:
        """For the log."""
        total = len(self.parameters) + len(self.missing) + len(self.other_shape)
        lines = [f"took {len(self.parameters)} of {total} parameters from {self.path}"]
        if self.missing:
            lines.append(f"{len(self.missing)} are not there and begin afresh: {_some(self.missing)}")
        if self.other_shape:
            shown = [f"{name} ({what})" for name, what in self.other_shape.items()]
            lines.append(f"{len(self.other_shape)} have another shape and begin afresh: {_some(shown)}")
        if self.unused:
            lines.append(f"{len(self.unused)} of those there are not used: {_some(self.unused)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "parameters": len(self.parameters), "names": self.parameters}


def initialise_from(engine: Engine, path: Path, folder: Path, beat: Callable[[], None]) -> Matched:
    """Puts the weights at `path` in the place of fresh ones, and of their average, where name and shape are the same.

    Each rank reads the stretches that it holds. All ranks must call it; `beat` hears that it goes on. Raises the same
    UserError on all where `path` holds no weights, is damaged, or nothing matches. `folder` is the stage's.
    """
    opened: list[SavedState] = []
    raise_alike(
        [problem for problem in engine.gather(said(lambda: opened.append(open_saved(path)), folder)) if problem]
    )
    state, shapes = opened[0], engine.shapes
    there = artifact.fingerprint(state.whole.manifest if state.whole else list(state.shapes.items()))
    if len(set(engine.gather(there))) > 1:
        raise UserError(f"train.init_from: {path} is not the same on all hosts: put it on a disk that they share.")

    def compared() -> Matched:
        found = Matched.of(state, shapes)
        state.require(WEIGHTS, {state.shared.get(name, name) for name in found.parameters})
        state.check([WEIGHTS], lambda count: beat())
        return found

    matched = alone(engine, compared, folder)
    taken = set(matched.parameters)
    for fragment in engine.needed():
        if fragment.name in taken:
            beat()
            state.fill(WEIGHTS, fragment.name, fragment.start, fragment.tensors[WEIGHTS])
            if AVERAGE in fragment.tensors:
                fragment.tensors[AVERAGE].copy_(fragment.tensors[WEIGHTS])
    if engine.rank == 0:
        for line in matched.lines():
            log.info("%s", line)
    return matched


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
