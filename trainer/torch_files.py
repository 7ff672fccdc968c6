"""Files of torch.save's that someone else may have written: what they hold is looked at, and no code in them ever run.

The pickle inside is read by torch's restricted unpickler, which knows tensors and plain containers, and the few classes
of DeepSpeed's that its checkpoints name, for each of which something inert stands in. Tensors stay where they are: each
is told as the stretch of the file in which it lies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import artifact
from model.errors import UserError
from trainer.tensor_files import Stretch
from trainer.zip_records import Record, check, records

DEEPSPEED = "deepspeed.runtime"


class Inert:
    """Stands in for an object of DeepSpeed's: it has what was saved of it, and does nothing."""

    def __init__(self, *_: Any) -> None: ...


CHECKERS = 4
"""Files whose checksums are compared at a time."""
SMALL = 16
"""Bytes of a record that holds a single value."""
HEADERS = 1 << 14
"""Bytes that a file takes beside its tensors, at most, where it holds few."""
MOST_VALUES = 2_000_000
STAND_INS: list[Any] = [
    (int, f"{DEEPSPEED}.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Inert, f"{DEEPSPEED}.fp16.loss_scaler.LossScaler"),
    (Inert, f"{DEEPSPEED}.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
    (str, "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum"),
]
"""What a checkpoint of DeepSpeed's may name beside tensors and plain values."""


def read_torch(path: Path) -> Any:
    """What torch.save wrote, with a Stretch in the place of each tensor; no data are read.

    Raises UserError where the file is missing, truncated, none of torch.save's, or a pickle that asks for anything
    that a checkpoint has no need of.
    """
    starts = {record.offset: record for record in records(path)}
    for record in starts.values():
        # torch itself does not look at the checksum of the pickle; single values are used as soon as they are read.
        if "/data/" not in record.name or record.size <= SMALL:
            check(path, record, lambda count: None)
    with torch.serialization.safe_globals(STAND_INS):
        foreign = _foreign(path)
        if foreign:
            raise UserError(
                f"{path} asks for {', '.join(sorted(foreign)[:3])}, which no checkpoint needs: what a pickle names "
                "would be run, so this one is not read."
            )
        try:
            value = torch.load(path, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is not read: {str(error).splitlines()[0]}") from None
        except (RuntimeError, EOFError, ValueError, AssertionError, AttributeError, KeyError, IndexError, TypeError):
            raise UserError(f"{path} is damaged: it does not read as a file of torch.save's.") from None
    return _Located(path, starts).of(value)


def _foreign(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, IndexError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged: it does not read as a file of torch.save's.") from None


class _Located:
    """Values with each tensor, which is on the meta device, as a Stretch."""

    def __init__(self, path: Path, starts: dict[int, Record]) -> None:
        self.path, self.starts, self.seen = path, starts, 0

    def of(self, value: Any) -> Any:
        """Raises UserError for what torch.save does not write, and for more values than a checkpoint has: a list of a
        list of the same list, each twice, is small in the file and endless here."""
        self.seen += 1
        if self.seen > MOST_VALUES:
            raise UserError(
                f"{self.path} is no checkpoint: it holds more than {MOST_VALUES:,} values beside its tensors."
            )
        if isinstance(value, Tensor):
            return self._stretch(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item) for item in value]
        return value

    def _stretch(self, value: Tensor) -> Stretch:
        storage = value.untyped_storage()
        offset, size, within = storage._checkpoint_offset, storage.nbytes(), int(value.storage_offset())
        record = self.starts.get(offset) if offset is not None else None
        if record is None or record.size != size or not value.is_contiguous():
            raise UserError(
                f"{self.path} is not laid out as torch.save does: it is damaged, or something else wrote it."
            )
        first = within * value.dtype.itemsize
        if first + value.nbytes > size:
            raise UserError(f"{self.path} is damaged: a tensor reaches beyond what is stored of it.")
        return Stretch(self.path, record.offset + first, value.dtype, tuple(value.shape))


def check_records(used: Iterable[Stretch], report: Callable[[int], None]) -> None:
    """Reads the records that hold `used` and compares their checksums; `report` hears of the bytes that were read.
    Raises UserError where one has changed since it was written."""
    stopped = threading.Event()

    def reported(count: int) -> None:
        if stopped.is_set():  # a record may be of many gigabytes
            raise CancelledError
        report(count)

    with checkers(stopped) as threads:
        for done in as_completed([threads.submit(check, path, record, reported) for record, path in _records_of(used)]):
            done.result()


@contextlib.contextmanager
def checkers(stopped: threading.Event | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that read and digest, for which Python's lock is not held. When an exception comes, what they have not
    begun is given up, and `stopped` is set."""
    threads = ThreadPoolExecutor(CHECKERS)
    try:
        yield threads
    except BaseException:
        if stopped is not None:
            stopped.set()
        raise
    finally:
        threads.shutdown(cancel_futures=True)


def bytes_of(used: Iterable[Stretch]) -> int:
    """That `check_records` would read."""
    return sum(record.size for record, _ in _records_of(used))


def _records_of(used: Iterable[Stretch]) -> list[tuple[Record, Path]]:
    starts = defaultdict(set)
    for stretch in used:
        if stretch.count:
            starts[stretch.path].add(stretch.offset)
    found = []
    for path, wanted in starts.items():
        there = sorted(records(path), key=lambda record: record.offset)
        offsets = [record.offset for record in there]
        found += [(there[index], path) for index in sorted({bisect_right(offsets, start) - 1 for start in wanted})]
    return found


def write_torch(path: Path, value: Any) -> dict[str, Any]:
    """torch.save, synced and read back; returns the file's size and SHA-256 as a manifest has them. `value` is made of
    tensors and plain containers. Raises OSError where the disk is full or does not give back what it was given."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # of a full disk torch only says that its position in the file is unexpected
        if shutil.disk_usage(path.parent).free >= _nbytes(value) + HEADERS:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    artifact.sync(path)
    if not _same(torch.load(path, mmap=True, weights_only=True), value):
        raise OSError(f"{path} reads back as something else than was written: the disk is not to be trusted.")
    return {"bytes": path.stat().st_size, "sha256": artifact.file_digest(path)}


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(_nbytes, items))


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(found, Tensor) and torch.equal(
            found.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)
        )
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(_same(found[key], item) for key, item in value.items())
    if isinstance(value, list):
        return len(found) == len(value) and all(map(_same, found, value))
    return bool(found == value)
