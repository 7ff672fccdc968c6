"""What one rank does alone, and all then know of: what the user can put right ends every rank with the same words."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data.cloud import Unreachable
from data.processes import disk_full
from model.errors import UserError

if TYPE_CHECKING:
    from trainer.engine import Engine

Result = TypeVar("Result")

USERS_OWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the disk that the user can put right."""


def alone(engine: Engine, action: Callable[[], Result], place: Path) -> Result:
    """What `action`, which writes to `place`, returns on rank 0, where alone it is done. What `said` tells of is raised
    on all ranks. All must call it."""
    box: list[Result] = []
    problem = said(lambda: box.append(action()), place) if engine.rank == 0 else None
    problem, box = engine.broadcast((problem, box))
    raise_alike([problem] if problem else [])
    return box[0]


def said(action: Callable[[], object], place: Path) -> str | None:
    """Does `action`, which writes to `place`; what goes wrong with the disk, the remote or by the user's mistake is
    returned in words for the other ranks, "user: …" or "fault: …"."""
    try:
        action()
    except Unreachable as error:
        return f"fault: {error}"
    except UserError as error:
        return f"user: {error}"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"user: {disk_full(place)}"
        kind = "user" if error.errno in USERS_OWN else "fault"
        return f"{kind}: {place} cannot be written: {error}"
    return None


def raise_alike(problems: Sequence[str]) -> None:
    """Raises the first of what ranks have `said`, which is the same on all of them: UserError or RuntimeError."""
    if problems:
        kind, _, message = problems[0].partition(": ")
        raise UserError(message) if kind == "user" else RuntimeError(message)
