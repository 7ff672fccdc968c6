"""Where audio lies: a local file, an object in a bucket, or a stretch of bytes of either; all of them open alike.

A path is text: a local path, an `s3://` or `gs://` address, or `bytes:OFFSET+SIZE:` and one of these, for a member of a
tar or a record of a shard. What is not local is copied to unnamed files of bounded size and gone with the process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import re
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.cloud import fetch, is_remote, objects
from model.artifact import fingerprint

STRETCH = re.compile(r"bytes:(\d+)\+(\d+):(.+)", re.DOTALL)
PACKED = re.compile(r"\.mds\.\w+$")
"""A compressed shard: stretches of it are counted in what it unpacks to."""
CACHE_BYTES = 256 << 20
"""Local copies that a process keeps, beside the newest and those in use."""
RUN_MARK = "recipe.yaml"
"""A folder that holds this is a run of Stretto: what it made is not material."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder. `name` is its path in the folder; `tag` (time or ETag) changes with its content."""

    name: str
    location: str
    size: int
    tag: str


def stretch(location: str, offset: int, size: int) -> str:
    """The path of `size` bytes of a file from `offset` on."""
    return f"bytes:{offset}+{size}:{location}"


def join(folder: str, name: str) -> str:
    """`name` as seen from `folder`; an address or an absolute path is itself."""
    if is_remote(name):
        return name
    if is_remote(folder) and not name.startswith("/"):
        scheme, _, rest = folder.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
    return os.path.join(folder, name)


def parent(location: str) -> str:
    """The folder of a file."""
    return location.rpartition("/")[0] if is_remote(location) else os.path.dirname(location)


def absolute(location: str) -> str:
    """`location` without `~` and relative parts, so that it means the same from everywhere; of a folder also without
    links."""
    if is_remote(location):
        return location.rstrip("/")
    path = Path(location).expanduser().absolute()
    return str(path.resolve() if path.is_dir() else path)


def is_file(location: str) -> bool:
    """Whether there is a file. Raises UserError where a bucket is out of reach."""
    if not is_remote(location):
        return Path(location).is_file()
    return next((found == location for found, _, _ in objects(location)), False)


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.RawIOBase]:
    """The bytes at `path`: an `io.FileIO` for a whole local file, else a reader that seeks in its stretch.

    Raises OSError where there is no such file, or none that can be read, and UserError where a bucket is out of reach.
    """
    location, offset, size = _parsed(path)
    if PACKED.search(location):
        file: Any = _Stretch(_COPIES.opened(location, lambda copy: _unpack(location, copy)), offset, size)
    elif not is_remote(location):
        handle = _regular(location)
        file = os.fdopen(handle, "rb", buffering=0) if size is None else _Stretch(handle, offset, size)
    elif size is None or location in _COPIES:
        file = _Stretch(_COPIES.opened(location, lambda copy: fetch(location, copy)), offset, size)
    else:
        file = _Stretch(_COPIES.opened(path, lambda copy: fetch(location, copy, offset, size)), 0, size)
    with file:
        yield file


def read_bytes(path: str) -> bytes:
    """All bytes at `path`. Raises as `opened` does."""
    with opened(path) as file:
        return file.readall()  # type: ignore[attr-defined]


def is_folder(location: str) -> bool:
    """Whether there is a folder: in a bucket, whether any object lies below it. Raises as `cloud.objects` does."""
    if not is_remote(location):
        return Path(location).is_dir()
    return next(objects(location.rstrip("/") + "/"), None) is not None


def files_below(folder: str) -> list[Entry]:
    """Every file below `folder` once, sorted by path; hidden ones and earlier runs' are left out.

    Local links are followed. A file that several paths lead to stands under its own, where that lies in the folder.
    """
    if is_remote(folder):
        return _remote_files(folder.rstrip("/") + "/")
    root = Path(folder)
    return [_entry(path, path.relative_to(root).as_posix()) for path in _local_files(root)]


def tags(locations: Iterable[str]) -> str:
    """A digest that changes when one of the files is added, removed or changed; none of them is read.

    Objects are looked up by listing the folders they lie in.
    """
    wanted = list(dict.fromkeys(locations))
    listed: dict[str, tuple[int, str]] = {}
    for prefix in sorted({parent(location) + "/" for location in wanted if is_remote(location)}):
        listed |= {location: (size, tag) for location, size, tag in objects(prefix)}
    found: list[Any] = []
    for location in wanted:
        state: tuple[int, int | str] | None = listed.get(location)
        if not is_remote(location):
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(location)
                state = (status.st_size, status.st_mtime_ns)
        found.append((ascii(location), state))
    return fingerprint(found)


def _parsed(path: str) -> tuple[str, int, int | None]:
    found = STRETCH.fullmatch(path)
    return (found[3], int(found[1]), int(found[2])) if found else (path, 0, None)


def _regular(location: str) -> int:
    """An open file. Pipes and devices, which would block, and folders are refused."""
    try:
        handle = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a name with a null byte
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location) from None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    folder = stat.S_ISDIR(os.fstat(handle).st_mode)
    os.close(handle)
    if folder:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), location)
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", location)


def _unpack(location: str, copy: IO[bytes]) -> None:
    from data.raw_shards import unpacked

    with tempfile.TemporaryFile() if is_remote(location) else open(_regular(location), "rb") as packed:
        if is_remote(location):
            fetch(location, packed)
            packed.seek(0)
        copy.write(unpacked(packed.read(), location.rpartition(".")[2]))


class _Stretch(io.RawIOBase):
    """Part of an open file, or all of it, read by position: threads can share the file."""

    def __init__(self, handle: int, offset: int, size: int | None) -> None:
        self._handle = handle
        self._offset = offset
        there = max(0, os.fstat(handle).st_size - offset)
        self._size = there if size is None else min(size, there)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._size - self._at))
        data = os.pread(self._handle, count, self._offset + self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


class _Copies:
    """Local copies of what is not local, the ones used longest ago dropped first. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[str, Future[IO[bytes]]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def forget(self) -> None:
        """Starts anew."""
        self._held, self._lock = OrderedDict(), threading.Lock()

    def opened(self, name: str, fill: Callable[[IO[bytes]], None]) -> int:
        """A descriptor of the copy called `name`, which `fill` writes where there is none yet."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held.move_to_end(name)
            else:
                mine: Future[IO[bytes]] = Future()
                self._held[name] = mine
        if held is None:
            held = mine
            # Without a name on the disk, and so gone with the process however that ends.
            copy = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                fill(copy)
                copy.flush()
            except BaseException as error:
                copy.close()
                with self._lock:
                    del self._held[name]
                mine.set_exception(error)
                raise
            mine.set_result(copy)
            self._shrink()
        return os.dup(held.result().fileno())

    def _shrink(self) -> None:
        """Lets copies go; one that is being read closes with its last reader."""
        with self._lock:
            sizes = {
                name: os.fstat(held.result().fileno()).st_size
                for name, held in self._held.items()
                if held.done() and not held.exception()
            }
            total, newest = sum(sizes.values()), next(reversed(self._held), None)
            for name, size in sizes.items():
                if total <= self.limit or name == newest:
                    return
                del self._held[name]
                total -= size


_COPIES = _Copies(CACHE_BYTES)
os.register_at_fork(after_in_child=_COPIES.forget)  # another thread of the parent may have held its lock


def _remote_files(prefix: str) -> list[Entry]:
    entries = [
        Entry(location[len(prefix) :], location, size, tag)
        for location, size, tag in objects(prefix)
        if not location.endswith("/")  # what consoles make to show a folder
    ]
    runs = tuple(f"{folder}/" for entry in entries if (folder := entry.name.removesuffix(f"/{RUN_MARK}")) != entry.name)
    shown = [entry for entry in entries if not any(part.startswith(".") for part in entry.name.split("/"))]
    return sorted(
        (entry for entry in shown if not entry.name.startswith(runs)), key=lambda entry: entry.name.split("/")
    )


def _entry(path: Path, name: str) -> Entry:
    status = path.stat()
    return Entry(name, str(path), status.st_size, str(status.st_mtime_ns))


def _local_files(folder: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for path in _walk(folder, ()):
        real = os.path.realpath(path)
        if real not in found or str(path) == real:
            found[real] = path
    return sorted(found.values())


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        return
    if above and any(entry.name == RUN_MARK for entry in entries):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        if is_folder:
            yield from _walk(Path(entry.path), (*above, real))
        elif is_file:  # not a pipe or a device, which would block
            yield Path(entry.path)
