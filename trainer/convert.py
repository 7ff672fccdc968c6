"""From checkpoints of any ZeRO stage and any number of ranks to weights that other tools read, piece by piece.

What is made is an artifact: it gets its name when all of its files are written, read back and digested. A conversion
that was interrupted goes on with the files that are finished, and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.new_folder import making, require_new
from data.progress import Progress
from model import artifact
from model.errors import UserError, nearest
from trainer.deepspeed_universal import universal_outputs
from trainer.optimizer import AVERAGE
from trainer.outputs import Output, journal, left_to_make, make, require_room, text_output
from trainer.saved_sources import open_saved
from trainer.saved_state import Described, SavedState
from trainer.tensor_files import WEIGHTS, stream_tensors
from trainer.weights_kinds import CONVERTED, INDEX, SINGLE, UNIVERSAL

FORMATS = {"fp32": CONVERTED, "universal": UNIVERSAL}
LARGEST_FILE = 5_000_000_000
"""Bytes of the tensors in a file of weights, as transformers has it."""
MEGABYTE = 1_000_000


def convert(
    source: Path,
    output: Path,
    to: str,
    average: bool = False,
    largest_file: int = LARGEST_FILE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the artifact `output` from what `source` holds, and returns its `info`.

    `fp32` are whole weights in safetensors, with `average` their moving average; `universal` is DeepSpeed's universal
    checkpoint. No more is in memory than one parameter, twice, or blocks of it. Raises UserError where `output` is
    there already, the disk is too small (before the first byte), or `source` cannot be converted or is damaged, which
    leaves nothing under the name `output`.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to!r} is no format.{nearest(to, FORMATS)} Choose {' or '.join(FORMATS)}.")
    state = open_saved(source)
    kinds = _kinds(state, to, average)
    fingerprint = artifact.fingerprint("convert", to, average, largest_file, state.fingerprint)
    if _finished(output, fingerprint):
        return artifact.read(output).info
    require_new(output)
    done = _Bytes(progress or Progress())
    outputs = (
        universal_outputs(state, done.add) if to == "universal" else _fp32(state, kinds[0], largest_file, done.add)
    )
    left = left_to_make(output, fingerprint, outputs)
    require_room(output, left)
    done.total = state.bytes_to_check(kinds) + 2 * sum(one.nbytes for one in left)
    state.check(kinds, done.add)
    inputs = {"checkpoint": state.fingerprint}
    with making(output), artifact.resume(output, FORMATS[to], fingerprint, inputs, _still_new(output)) as made:
        folder, info, files = made
        files.update(journal(folder))
        for one in left:
            files[one.name] = make(folder, one)
        parameters = sum(math.prod(shape) for shape in state.shapes.values())
        info.update(format=to, parameters=parameters, tensors=len(state.shapes), average=average)
        info["source"] = {"what": state.what, **state.origin}
    return info


def _kinds(state: SavedState, to: str, average: bool) -> list[str]:
    """What of the tensors is converted."""
    if to == "universal":
        if average:
            raise UserError("--average goes with --to fp32: a universal checkpoint has the weights that are trained.")
        return [WEIGHTS, *(kind for kind in state.kinds if kind != AVERAGE)]
    if average and AVERAGE not in state.kinds:
        raise UserError(f"{state.path} keeps no average of its weights: it was trained without train.ema_decay.")
    return [AVERAGE if average else WEIGHTS]


class _Bytes:
    """Counts what is done, for the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.done, self.total = progress, 0, 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """From any thread."""
        with self._lock:
            self.done += count
            self.progress.update(self.done // MEGABYTE, max(self.done, self.total) // MEGABYTE, "megabytes")


# Whole weights


def _fp32(state: SavedState, kind: str, largest: int, report: Callable[[int], None]) -> list[Output]:
    """One file, or several and the list of them."""
    state.require(kind)
    parts = _parts(state.whole_weights(), largest)
    count = len(parts)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    outputs = [_weights(state, kind, name, part, report) for name, part in zip(names, parts, strict=True)]
    if count == 1:
        return outputs
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in outputs)},
        "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in sorted(part)},
    }
    return [*outputs, text_output(INDEX, json.dumps(index, indent=2) + "\n")]


def _parts(described: Described, largest: int) -> list[Described]:
    """Tensors in order, as many to a file as `largest` bytes take; a larger one has a file of its own."""
    parts: list[Described] = [{}]
    for name, (dtype, shape) in described.items():
        if parts[-1] and _nbytes(parts[-1]) + dtype.itemsize * math.prod(shape) > largest:
            parts.append({})
        parts[-1][name] = dtype, shape
    return parts


def _nbytes(described: Described) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in described.values())


def _weights(state: SavedState, kind: str, name: str, part: Described, report: Callable[[int], None]) -> Output:
    def fill(tensor: str, start: int, target: Any) -> None:
        state.fill(kind, tensor, start, target)
        report(target.nbytes)

    return Output(name, _nbytes(part), lambda path: stream_tensors(path, part, fill, {"format": "pt"}))


# The folder


def _finished(output: Path, fingerprint: str) -> bool:
    """Whether an earlier call was killed between giving `output` its name and clearing up; that is done now."""
    if not (output / artifact.WORK).is_dir() or artifact.read(output).fingerprint != fingerprint:
        return False
    shutil.rmtree(output / artifact.WORK)
    return True


def _still_new(output: Path) -> Callable[[Path], None]:
    """Nothing that was put there meanwhile is replaced."""
    return lambda folder: require_new(output)
