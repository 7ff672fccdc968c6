"""Folders that a command makes for its user: nothing is overwritten, and one process makes each. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.lock import locked
from model import artifact
from model.errors import UserError


def require_new(folder: Path) -> None:
    """Raises UserError where something is there already that is more than an empty folder, or it is no name."""
    if artifact.occupied(folder):
        raise UserError(f"{folder} is there already: name a new folder, so that nothing is overwritten.")
    if folder.name in ("", ".."):
        raise UserError(f"{folder} is no name for a new folder: say what it is to be called.")


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """While `folder` is made. Raises UserError where it is there already, or another process makes it at this moment:
    they would write to the same files."""
    require_new(folder)
    place = folder.with_name(f".{folder.name}.lock")
    begun = [parent for parent in place.parents if not parent.exists()]
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        try:
            require_new(folder)  # it may have been made just now
            yield
        finally:
            shutil.rmtree(place, ignore_errors=True)  # on NFS the lock itself stays until it is closed
            with contextlib.suppress(OSError):  # of the first that is not empty
                for parent in begun:
                    parent.rmdir()
