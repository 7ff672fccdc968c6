"""How long work tells where it is: one small file, read by the launcher's progress bars and `stretto status`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Progress:
    """Reports `done` of `total` with a few figures, at most twice a second, to a file that is replaced whole.

    Without a path it does nothing, so that library code can always report.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._started = time.time()
        self._written = 0.0

    def update(self, done: int, total: int, message: str = "", **figures: float) -> None:
        """Says that `done` of `total` units are finished; `figures` are shown beside the bar (loss, clips/s ...)."""
        now = time.time()
        if self.path is None or (done < total and now - self._written < 0.5):
            return
        self._written = now
        row = {
            "done": done, "total": total, "message": message, "figures": figures, "started": self._started, "time": now,
        }  # fmt: skip
        partial = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(row))
        partial.replace(self.path)
