"""The one exception that means: the user can put this right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done as asked.

    The message is one or two plain lines that name the key or file and say what to do. The command line prints it
    without a stack trace and exits with code 2; every other exception is a fault of ours and is allowed to raise.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message that asks whether the one of `names` that is most like `name` was meant; often empty."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""
