"""What lies where in the zip files that torch.save writes, and what its checksums are. Imports no torch."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model import artifact
from model.errors import UserError

LOCAL_HEADER = 30
"""Bytes of a zip file's local header before the name."""
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Record:
    """One file in a zip file, as its directory has it."""

    name: str
    offset: int
    """Of its first byte."""
    size: int
    crc: int


def records(path: Path) -> list[Record]:
    """The directory of a zip file. Raises UserError where it is none, or truncated: the directory is at the end."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return [_record(entry, file) for entry in archive.infolist()]
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except PermissionError:
        raise
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OSError):  # what it says leads nowhere
        raise UserError(f"{path} is truncated or damaged, or no file of torch.save's (in its zip format).") from None


def _record(entry: zipfile.ZipInfo, file: BinaryIO) -> Record:
    file.seek(entry.header_offset)
    name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[26:])
    if entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile
    return Record(entry.filename, entry.header_offset + LOCAL_HEADER + name + extra, entry.file_size, entry.CRC)


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes with the contents of any of the files: of names, sizes and checksums of all records in them."""
    return artifact.fingerprint(
        {
            f"{path.parent.name}/{path.name}": [(record.name, record.size, record.crc) for record in records(path)]
            for path in paths
        }
    )


def check(path: Path, record: Record, report: Callable[[int], None]) -> None:
    """Reads a record and compares its checksum; `report` hears of the bytes. Raises UserError where it has changed."""
    found, left = 0, record.size
    with path.open("rb", buffering=0) as file:
        file.seek(record.offset)
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            found, left = zlib.crc32(block, found), left - len(block)
            report(len(block))
    if left or found != record.crc:
        raise UserError(f"{path} is damaged: {record.name} in it has changed since it was written.")
