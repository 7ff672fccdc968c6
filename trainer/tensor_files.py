"""Files of tensors, in the safetensors format: written straight from memory or piece by piece, read back slice by
slice."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError
from trainer.large_file import LargeFile

WEIGHTS = "weights"
"""The fp32 weights among the kinds of tensors that are saved; the others have the names of the optimizer's state."""
DTYPES = {
    "torch.float32": "F32", "torch.uint8": "U8", "torch.int64": "I64", "torch.float64": "F64", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.bool": "BOOL",
}  # fmt: skip
NAMES = {name: getattr(torch, dtype.removeprefix("torch.")) for dtype, name in DTYPES.items()}
BLOCK_BYTES = 16 << 20
LARGEST_HEADER = 100_000_000
"""Bytes; the format allows no more."""

NOT_PLAIN = object()
UNKNOWN = re.compile(r"F[468](_\w+)?|C64|U(16|32|64)")
"""Types of the safetensors format that are not read here."""

Fill = Callable[[str, int, Tensor], None]
"""Fills a flat tensor with the elements of the tensor of that name, from a number on."""


@dataclass(frozen=True)
class Stretch:
    """Elements that lie end to end in a file, from byte `offset` on. Nothing is mapped: a mapping would count as this
    process's memory, however little of it is looked at."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def part(self, first: int, count: int) -> Stretch:
        """`count` elements of it from `first` on, flat. Raises UserError where it has not so many."""
        if not 0 <= first <= first + count <= self.count:
            raise UserError(f"{self.path} holds {self.count} elements where {first + count} should be: it is damaged.")
        return Stretch(self.path, self.offset + first * self.dtype.itemsize, self.dtype, (count,))

    def read(self, first: int, target: Tensor) -> None:
        """Fills `target` `[count]` with the elements from `first` on. Raises UserError where the file ends before."""
        plain = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        source = target.detach() if plain else torch.empty(len(target), dtype=self.dtype)
        view = source.view(torch.uint8).numpy().data if len(target) else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise UserError(f"{self.path} ends before what it should hold: it is truncated.")
                view = view[count:]
        if source is not target and not plain:
            target.copy_(source)

    def item(self) -> int | float:
        """The value of a single element."""
        value = torch.empty(1, dtype=self.dtype)
        self.read(0, value)
        return value.item()


def plain(value: Any) -> Any:
    """`value` with tensors of one element as numbers and without entries that are no plain values or containers of
    these; NOT_PLAIN where nothing is left."""
    if isinstance(value, Stretch):
        return value.item() if value.count == 1 else NOT_PLAIN
    if isinstance(value, dict):
        found = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not NOT_PLAIN}
    if isinstance(value, list):
        items = [plain(item) for item in value]
        return NOT_PLAIN if any(item is NOT_PLAIN for item in items) else items
    return value if isinstance(value, int | float | bool | str | None) else NOT_PLAIN


def stretches(path: Path) -> dict[str, Stretch]:
    """The tensors of a safetensors file, by name. Raises UserError where it is none, or not whole, or of a type that is
    not known here."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LARGEST_HEADER, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if UNKNOWN.fullmatch(entry["dtype"]):
                raise UserError(f"{path} holds {name!r} as {entry['dtype']}, which is not read here.")
        found = {
            name: Stretch(path, 8 + length + entry["data_offsets"][0], NAMES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        end = 8 + length
        for name, stretch in sorted(found.items(), key=lambda entry: (entry[1].offset, entry[1].nbytes)):
            first, last = header[name]["data_offsets"]
            if stretch.offset != end or last - first != stretch.nbytes or min(stretch.shape, default=0) < 0:
                raise ValueError  # the format leaves no gaps
            end += stretch.nbytes
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is no safetensors file, or its start is damaged.") from None
    if end != size:
        raise UserError(
            f"{path} has {size} bytes where {end} should be: it is {'truncated' if size < end else 'damaged'}."
        )
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors, syncs the file and reads it back; returns its size and SHA-256 as a manifest has them.

    The safetensors package first copies everything into one string and holds Python's lock meanwhile, which would stop
    a training that goes on beside this. Raises OSError, also where the disk does not give back what it was given.
    """
    header = header_of({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    parts = [header, *(tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors.values())]
    return _write(path, lambda: parts)


def stream_tensors(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fill: Fill,
    metadata: dict[str, str] | None = None,
) -> dict[str, Any]:
    """`write_tensors` for tensors that are never whole in memory: each is asked of `fill` in blocks, once to be written
    and once more to be compared with what the disk gives back."""

    def parts() -> Iterator[np.ndarray]:
        yield header_of(described, metadata)
        for name, (dtype, shape) in described.items():
            count, most = math.prod(shape), BLOCK_BYTES // dtype.itemsize
            block = torch.empty(min(most, count), dtype=dtype)
            for start in range(0, count, most):
                part = block[: count - start]
                fill(name, start, part)
                yield part.view(torch.uint8).numpy()

    with ThreadPoolExecutor(1) as helper:
        return _write(path, parts, helper)


def header_of(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> np.ndarray:
    """How a safetensors file begins that holds tensors of these types and shapes in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[str(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def _write(
    path: Path, parts: Callable[[], Iterable[np.ndarray]], helper: ThreadPoolExecutor | None = None
) -> dict[str, Any]:
    """Writes the bytes of `parts`, which is called again to compare what the disk gives back. A `helper` digests while
    the disk writes, and reads while `parts` are made again: faster, where no training wants the processor."""
    digest = hashlib.sha256()
    with LargeFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        for block in _blocks(parts()):
            digested = _begin(helper, digest.update, block.data)
            file.write(block.data)
            digested()
        file.sync()
    if not _holds(path, parts(), helper):
        raise OSError(f"{path} reads back as something else than was written: the disk is not to be trusted.")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _holds(path: Path, parts: Iterable[np.ndarray], helper: ThreadPoolExecutor | None) -> bool:
    """Whether the file is those bytes: they are here to compare with, which takes less than another digest."""
    target, blocks = _page_aligned(BLOCK_BYTES), _blocks(parts)
    with LargeFile(path, os.O_RDONLY) as file:
        while True:
            reading = _begin(helper, file.read_into, target.data)
            block = next(blocks, None)
            count = reading()
            if block is None:
                return count == 0
            if count != len(block) or not np.array_equal(target[:count], block):
                return False


def _begin(helper: ThreadPoolExecutor | None, function: Callable[[Any], Any], block: memoryview) -> Callable[[], Any]:
    """Starts `function(block)`, or does it now without a helper; returns what waits for its result."""
    if helper is None:
        result = function(block)
        return lambda: result
    return helper.submit(function, block).result


def _blocks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of `parts`, one after another, in blocks of BLOCK_BYTES, the last of which is shorter. All are the same
    memory. Numpy copies and compares without holding Python's lock."""
    block = _page_aligned(BLOCK_BYTES)
    filled = 0
    for part in parts:
        done = 0
        while done < len(part):
            count = min(BLOCK_BYTES - filled, len(part) - done)
            block[filled : filled + count] = part[done : done + count]
            filled, done = filled + count, done + count
            if filled == BLOCK_BYTES:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _page_aligned(size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def slice_name(kind: str, name: str, start: int) -> str:
    """What elements from `start` of the flattened tensor `name` are called in a file, `kind` saying what of it."""
    return f"{kind}/{name}/{start}"


class SlicedTensors:
    """Flattened tensors whose slices lie in several files, whoever wrote which. Only what is asked for is read."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        """The files of `paths` hold slices by `slice_name`. Raises UserError where one is not whole."""
        self._slices: dict[tuple[str, str], list[tuple[int, int, Stretch]]] = defaultdict(list)
        for path in paths:
            for key, stretch in stretches(path).items():
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                if not (name and start.isdigit()):
                    raise UserError(
                        f"{path} holds {key!r}, which is no slice of a checkpoint's: it does not belong there."
                    )
                self.add(kind, name, int(start), stretch)

    def add(self, kind: str, name: str, start: int, stretch: Stretch) -> None:
        """Says where the elements from `start` lie. Raises UserError where they are complex, which nothing here is."""
        if stretch.dtype.is_complex:
            raise UserError(f"{stretch.path} holds {name!r} as {stretch.dtype}, which is not converted.")
        slices = self._slices[kind, name]
        slices.append((start, stretch.count, stretch))
        slices.sort(key=lambda part: part[0])

    def kinds(self) -> dict[str, set[str]]:
        """What there is of each tensor."""
        found: dict[str, set[str]] = defaultdict(set)
        for kind, name in self._slices:
            found[name].add(kind)
        return found

    def of(self, kind: str) -> dict[str, list[Stretch]]:
        """All stretches of a kind, by the name of the tensor."""
        return {name: [part for *_, part in slices] for (other, name), slices in self._slices.items() if other == kind}

    def lacking(self, kind: str, name: str, count: int) -> int | None:
        """The first of `count` elements that is in no file or in two; None where each is in one."""
        end = 0
        for start, length, _ in self._slices.get((kind, name), []):
            if length and start != end:
                break
            end += length
        return None if end == count else end

    def read(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Fills `target` `[count]` with the elements from `start`. Raises KeyError where some are in no file."""
        filled = 0
        for first, count, stretch in self._slices.get((kind, name), []):
            low, high = max(first, start), min(first + count, start + len(target))
            if low < high and low == start + filled:
                stretch.read(low - first, target[low - start : high - start])
                filled = high - start
        if filled < len(target):
            raise KeyError(f"elements {start + filled} to {start + len(target)} of {kind} {name!r} are in no file")
