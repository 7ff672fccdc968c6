"""Artifacts: folders with a manifest, which exist whole or not at all.

An artifact is written under a partial name, its files are digested and synced, its manifest is written last, and one
atomic rename gives it its name. A reader that sees the name therefore sees all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError

FORMAT_VERSION = 1
"""What manifests and the files beside them look like. It is raised when an earlier Stretto could not read them; `read`
is where the manifest of an older one is brought up to date then. tests/golden/ keeps one of each version."""
MANIFEST = "manifest.json"
DIGEST = "digest"
"""In a manifest: of all else that it says."""
FIRST_KEYS = {"kind", "format_version", "fingerprint", "inputs", "info", "files"}
"""All that manifests of the first versions say."""
CARD = "README.md"
"""A page for people, who may edit it: no manifest lists it."""
PARTIAL = ".partial"
UNFINISHED = ".unfinished"
WORK = ".work"
"""In a folder that is UNFINISHED: what is needed to go on with it, and no part of the artifact."""
ORIGIN = "origin.json"
"""In there: the fingerprint of what it is to become."""


class NewerFormat(UserError):
    """Something written by a later Stretto. It is not damaged: nobody may pass it over or make it anew."""


@dataclass(frozen=True)
class Artifact:
    """A finished folder and what its manifest says of it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def info(self) -> dict[str, Any]:
        """What the stage that made it wanted the next ones to know (shapes, rates, counts)."""
        return self.manifest["info"]


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any of `parts` (JSON values) changes, whatever the order of mapping keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_room(path: Path, needed: int) -> None:
    """Raises UserError where the disk that `path` is to be made on has not `needed` bytes free."""
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"this takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {place}: make room, or name a "
            "folder on another disk."
        )


def sync(path: Path) -> None:
    """Flushes one file or folder to the disk, so that a rename that follows cannot overtake its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON in one step: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}{PARTIAL}-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    sync(partial)
    partial.replace(path)


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes": …, "sha256": …}}` for `names`, or every file below `folder` but manifest and card."""
    found = folder.rglob("*") if names is None else (folder / name for name in names)
    files = sorted(path for path in found if path.is_file() and path not in (folder / MANIFEST, folder / CARD))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }


@contextlib.contextmanager
def create(
    path: Path, kind: str, fingerprint: str, inputs: dict[str, str] | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Builds the artifact `path`: yields a partial folder to fill and the `info` mapping of its manifest.

    On a clean exit the folder is digested, synced and renamed to `path`, replacing what stood there at the beginning.
    On an error the partial folder is removed and `path` stays as it was. `inputs` maps the artifacts it was made from
    to fingerprints. Raises UserError where `path` was free at the beginning and is not at the end.
    """
    was_occupied = occupied(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    info: dict[str, Any] = {}
    try:
        yield partial, info
        write_manifest(partial, kind, fingerprint, inputs, info)
        if not was_occupied and occupied(path):
            raise UserError(f"{path} was not there when this began, and is now: it is not overwritten. Try again.")
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """The folder in which the artifact `path` is made where that goes on after an interruption."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def began(path: Path, fingerprint: str) -> bool:
    """Whether an artifact with this fingerprint has been begun at `path` and can be gone on with."""
    try:
        return made_for(unfinished(path)) == fingerprint
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return False


def made_for(folder: Path) -> str:
    """The fingerprint of what a folder that is UNFINISHED is to become."""
    return json.loads((folder / WORK / ORIGIN).read_text())["fingerprint"]


@contextlib.contextmanager
def resume(
    path: Path,
    kind: str,
    fingerprint: str,
    inputs: dict[str, str] | None = None,
    sealed: Callable[[Path], None] = lambda folder: None,
) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """As `create`, in a folder that stays as it is when the work is interrupted and is there again the next time.

    What was begun with another fingerprint is removed. Notes for the next attempt belong into its folder WORK, which is
    cleared away at the end. Also yields a mapping for what `describe_files` would say of files that are digested and
    synced already. `sealed` is called with the folder when its manifest is written, just before it gets its name.
    """
    folder = unfinished(path)
    if not began(path, fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / WORK).mkdir(parents=True)
        write_json(folder / WORK / ORIGIN, {"fingerprint": fingerprint})
    info: dict[str, Any] = {}
    files: dict[str, Any] = {}
    yield folder, info, files
    for torn in folder.glob(f".{MANIFEST}{PARTIAL}*"):  # by a kill while an earlier attempt wrote it
        torn.unlink()
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    rest = describe_files(folder, {file.as_posix() for file in found if file.parts[0] != WORK} - files.keys())
    for name in rest:
        sync(folder / name)
    seal(folder, kind, fingerprint, inputs or {}, info, dict(sorted((files | rest).items())))
    sealed(folder)
    replace_folder(folder, path)
    shutil.rmtree(path / WORK)  # last, so that until then a kill loses nothing


def write_manifest(
    folder: Path,
    kind: str,
    fingerprint: str,
    inputs: dict[str, str] | None = None,
    info: dict[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Digests and syncs the files of `folder`, all of them or those in `names`, and writes its manifest last."""
    files = describe_files(folder, names)
    for name in files:
        sync(folder / name)
    seal(folder, kind, fingerprint, inputs or {}, info or {}, files)


def seal(
    folder: Path,
    kind: str,
    fingerprint: str,
    inputs: dict[str, str],
    info: dict[str, Any],
    files: dict[str, dict[str, Any]],
) -> None:
    """Writes the manifest of a folder whose `files`, as `describe_files` gives them, are synced already."""
    manifest = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "inputs": inputs,
        "info": info,
        "files": files,
    }
    write_json(folder / MANIFEST, {**manifest, DIGEST: _digest(manifest)})
    sync(folder)


def _digest(manifest: dict[str, Any]) -> str:
    """Changes with any of what a manifest says but its own digest."""
    said = {key: value for key, value in manifest.items() if key != DIGEST}
    return fingerprint(json.loads(json.dumps(said)))  # as it is read back: names of numbers are strings then


def unchanged(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is as it was written. Those of the first versions do not tell."""
    if DIGEST not in manifest:
        return manifest.keys() <= FIRST_KEYS  # else that name itself may have changed
    return manifest[DIGEST] == _digest(manifest)


def occupied(path: Path) -> bool:
    """Whether there is something at `path` that is more than an empty folder."""
    return os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; what stood at `path` is moved away first and removed after."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def read(path: Path, kind: str | None = None) -> Artifact:
    """The artifact at `path`. Raises UserError where there is none, or of another kind, NewerFormat of a later one."""
    try:
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a finished Stretto artifact: it has no {MANIFEST}.") from None
    return Artifact(path, parse(text, str(path), kind))


def is_artifact(path: Path) -> bool:
    """Whether the manifest at `path`, if there is one, is of an artifact: others use that name too."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True  # a damaged one, as far as can be told
    return isinstance(found, dict) and "format_version" in found


def parse(text: bytes, place: str, kind: str | None = None) -> dict[str, Any]:
    """The manifest of the artifact at `place`, a path or an address. Raises UserError as `read` does."""
    try:
        manifest = json.loads(text)
        version, found = manifest["format_version"], manifest["kind"]
        newer = version > FORMAT_VERSION
        # A name that leads out of the folder would have whoever copies the artifact read and write elsewhere.
        damaged = not newer and any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise UserError(f"{place}/{MANIFEST} is damaged: it does not read as a Stretto manifest.")
    if newer:
        raise NewerFormat(
            f"{place} has format version {version}; this Stretto reads up to {FORMAT_VERSION}: upgrade it."
        )
    if kind is not None and found != kind:
        raise UserError(f"{place} holds {found!r}, not {kind!r}.")
    return manifest


def problems(artifact: Artifact, digests: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What differs between the files on disk and the manifest, in words; an empty list when the artifact is whole.

    Without `digests` only presence and size are compared, which reads no file. Of `share` = (i, n) only the i-th of n
    parts of the files is looked at, so that n processes can divide the work.
    """
    found = []
    for name, expected in list(artifact.manifest["files"].items())[share[0] :: share[1]]:
        file = artifact.path / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            found.append(f"{file} has {file.stat().st_size} bytes, {expected['bytes']} expected")
        elif digests and file_digest(file) != expected["sha256"]:
            found.append(f"{file} has changed: its digest is not the one in the manifest")
    return found
