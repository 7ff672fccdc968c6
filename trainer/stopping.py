"""Being told to stop: by SIGTERM, or by SIGUSR1, which clusters send some time before they take a machine away.

Signals belong to the process, so what is kept of them does too. Imports nothing heavy: a rank heeds them before it
spends seconds on imports.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_told = False


def heed() -> None:
    """From now on a signal to stop is noted, and the training loop acts on it when it comes by."""
    for number in SIGNALS:
        signal.signal(number, _note)


def told() -> bool:
    """Whether this rank has been told to stop."""
    return _told


def _note(number: int, frame: object) -> None:
    global _told
    _told = True
