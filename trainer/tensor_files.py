"""Files of tensors, in the safetensors format: written straight from memory, read back slice by slice."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.large_file import LargeFile

DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int8": "I8", "torch.uint8": "U8",
}  # fmt: skip
BLOCK_BYTES = 16 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors, syncs the file and reads it back; returns its size and SHA-256 as a manifest has them.

    The safetensors package first copies everything into one string and holds Python's lock meanwhile, which would stop
    a training that goes on beside this. Raises OSError, also where the disk does not give back what it was given.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)]
    parts += [tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    digest = hashlib.sha256()
    with LargeFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        for block in _blocks(parts):
            digest.update(block.data)
            file.write(block.data)
        file.sync()
    if not _holds(path, parts):
        raise OSError(f"{path} reads back as something else than was written: the disk is not to be trusted.")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _holds(path: Path, parts: list[np.ndarray]) -> bool:
    """Whether the file is those bytes: they are here to compare with, which takes less than another digest."""
    target = _page_aligned(BLOCK_BYTES)
    with LargeFile(path, os.O_RDONLY) as file:
        for block in _blocks(parts):
            there = target[: len(block)]
            if file.read_into(there.data) < len(block) or not np.array_equal(there, block):
                return False
        return file.read_into(target.data) == 0


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

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._slices: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in self._files:
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                count = file.get_slice(key).get_shape()[0]
                self._slices[kind, name].append((int(start), count, file, key))
        for slices in self._slices.values():
            slices.sort(key=lambda part: part[0])

    def read(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Fills `target` `[count]` with the elements from `start`. Raises KeyError where some are in no file."""
        filled = 0
        for first, count, file, key in self._slices[kind, name]:
            low, high = max(first, start), min(first + count, start + len(target))
            if low < high and low == start + filled:
                target[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])
                filled = high - start
        if filled < len(target):
            raise KeyError(f"elements {start + filled} to {start + len(target)} of {kind} {name!r} are in no file")
