"""Where training writes its figures: `metrics.jsonl`, TensorBoard and the progress file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data.progress import Progress


def scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, nested names joined by slashes."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from scalars({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


class MetricsWriter:
    """Rank 0's record of a stage; rows of steps at or after `start` that an interrupted run left are dropped."""

    def __init__(self, folder: Path, start: int, total: int, progress: Progress) -> None:
        self.path = folder / "metrics.jsonl"
        self.total = total
        self.progress = progress
        self._drop_from(start)
        self._file = self.path.open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def _drop_from(self, start: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except json.JSONDecodeError:  # the line a killed run did not finish
                continue
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Appends one row; `step` counts finished optimizer steps."""
        row = {"kind": kind, "step": step, "time": time.time(), **figures}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in scalars(figures):
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, loss: float | None = None) -> None:
        """Moves the progress bar."""
        figures: dict[str, float] = {} if loss is None else {"loss": loss}
        self.progress.update(step, self.total, "", **figures)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
