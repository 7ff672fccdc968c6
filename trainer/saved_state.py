"""Saved weights, and the optimizer's state where there is one, whatever wrote them: checkpoints of Stretto's and of
DeepSpeed's, trained stages, and weights in safetensors files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import artifact
from model.errors import UserError
from trainer.tensor_files import DTYPES, WEIGHTS, SlicedTensors, Stretch
from trainer.torch_files import bytes_of, check_records, checkers

Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass
class SavedState:
    """Flattened tensors in files, of which only what is asked for is read."""

    path: Path
    """The folder or file."""
    what: str
    """In words."""
    identify: Callable[[], str]
    """Gives what changes with any of it, for which all may have to be read where no manifest tells."""
    tensors: SlicedTensors
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, which are fp32 or are made so."""
    buffers: dict[str, Stretch] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    """Further names of parameters and the names that they are under here."""
    step: int = 0
    updates: Tensor | int | float | None = None
    """How often the optimizer changed the weights, as it keeps it."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Settings of the optimizer's groups of parameters."""
    common: dict[str, Any] = field(default_factory=dict)
    """What DeepSpeed's engines keep beside: counts, and the state of the schedule."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What a manifest is to say of it."""
    whole: artifact.Artifact | None = None
    """The manifest with the digests of its files, where there is one."""
    lacks: str = ""
    """Why there is no optimizer's state, where there should be one."""
    zipped: bool = False
    """Whether its files are torch.save's, which have checksums."""

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any of it."""
        return self.identify()

    @property
    def kinds(self) -> list[str]:
        """What there is beside the weights: the names of the optimizer's state."""
        there = self.tensors.kinds()
        return sorted({kind for name in self.shapes for kind in there[name]} - {WEIGHTS})

    def require(self, kind: str, names: Iterable[str] | None = None) -> None:
        """Raises UserError unless each element of `names`, or of every parameter, is in one of the files."""
        for name in self.shapes if names is None else names:
            count = math.prod(self.shapes[name])
            lacking = self.tensors.lacking(kind, name, count)
            if lacking is not None:
                raise UserError(
                    f"{self.path} does not hold {kind} of {name!r} once: elements from {lacking} of {count} are "
                    "missing or there twice. Files are missing, or are of several checkpoints."
                )

    def whole_weights(self) -> Described:
        """Type and shape of all that a model's state dict holds, those that take most bytes an element first. Raises
        UserError where a buffer's type is none that safetensors files are written with here."""
        names = {**{name: name for name in self.shapes}, **self.shared}
        found: Described = {name: (torch.float32, self.shapes[source]) for name, source in names.items()}
        for name, stretch in self.buffers.items():
            dtype = torch.float32 if stretch.dtype.is_floating_point else stretch.dtype
            if str(dtype) not in DTYPES:
                raise UserError(f"{stretch.path} holds {name!r} as {dtype}, which is not converted.")
            found[name] = (dtype, stretch.shape)
        return dict(sorted(found.items(), key=lambda entry: (-entry[1][0].itemsize, entry[0])))

    def fill(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """The elements from `start` of a parameter or a buffer."""
        if name in self.buffers:
            self.buffers[name].read(start, target)
        else:
            self.tensors.read(kind, self.shared.get(name, name), start, target)

    def read(self, kind: str, name: str) -> Tensor:
        """A parameter whole, or what else `kind` says of it, fp32."""
        value = torch.empty(self.shapes[name])
        self.tensors.read(kind, name, 0, value.view(-1))
        return value

    def bytes_to_check(self, kinds: Iterable[str]) -> int:
        """That `check` reads."""
        if self.whole is not None:
            return sum(file["bytes"] for file in self.whole.manifest["files"].values())
        return bytes_of(self._used(kinds)) if self.zipped else 0

    def check(self, kinds: Iterable[str], report: Callable[[int], None] = lambda count: None) -> None:
        """Reads what is to be used and compares it with the digests or checksums that were noted when it was written;
        `report` hears of the bytes. Raises UserError that names what is damaged."""
        if self.whole is None:
            if self.zipped:
                check_records(self._used(kinds), report)
            return
        whole, files = self.whole, self.whole.manifest["files"]
        with checkers() as threads:
            begun = {
                threads.submit(artifact.problems, whole, share=(number, len(files))): file["bytes"]
                for number, file in enumerate(files.values())
            }
            for done in as_completed(begun):
                if wrong := done.result():
                    raise UserError(f"{wrong[0]}: {self.path} is damaged.")
                report(begun[done])

    def _used(self, kinds: Iterable[str]) -> list[Stretch]:
        parts = [part for kind in kinds for found in self.tensors.of(kind).values() for part in found]
        return [*parts, *self.buffers.values()]
