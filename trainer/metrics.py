"""Where training writes its figures: `metrics.jsonl`, TensorBoard and the progress file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data.progress import Progress
from trainer.callback import Callback
from trainer.engine import Engine
from trainer.setup import StageSetup


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
    """Rank 0's record of a stage; rows of steps after `start` that an interrupted run left are dropped."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._drop_after(start)
        self._file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def _drop_after(self, start: int) -> None:
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
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self.tensorboard.close()


class Metrics(Callback):
    """Logs every `log_every` steps. All ranks take part, rank 0 writes."""

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.engine = engine
        self.writer: MetricsWriter | None = None
        self._progress = Progress(setup.run / "progress" / f"{setup.stage}.json")
        self._then = 0.0
        self._step_then = 0
        self._frames_then = 0

    def on_start(self, training: Any) -> None:
        if self.engine.rank == 0:
            self.writer = MetricsWriter(self.setup.folder, training.step)
        self._show(training, {})
        self._restart(training)

    def _restart(self, training: Any) -> None:
        self._then = time.monotonic() - training.elsewhere
        self._step_then, self._frames_then = training.step, training.data.frames

    def after_step(self, training: Any, losses: Tensor) -> None:
        config = training.config
        if not training.due(config.log_every):
            return
        loss = float(losses.mean())
        seconds = max(time.monotonic() - training.elsewhere - self._then, 1e-9)
        steps = training.step - self._step_then
        taken = torch.tensor(float(training.data.frames - self._frames_then), device=self.engine.device)
        frames = float(self.engine.mean(taken)) * self.engine.world_size
        self.write(
            "train",
            training.step,
            loss=loss,
            learning_rate=training.learning_rate,
            gradient_norm=self.engine.gradient_norm(),
            windows_per_second=steps * config.global_batch / seconds,
            tokens_per_second=frames * len(self.engine.module.quantizers) / seconds,
        )
        self._show(training, {"loss": loss})
        self._restart(training)

    def on_checkpoint(self, training: Any, step: int) -> None:
        self.write("checkpoint", step, stall=training.checkpoints.stall)

    def on_end(self, training: Any) -> None:
        self.close()

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Appends a row of `figures`, on rank 0; `step` counts finished optimizer steps."""
        if self.writer:
            self.writer.write(kind, step, **figures)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    def _show(self, training: Any, figures: dict[str, float]) -> None:
        """Moves the progress bar."""
        if self.engine.rank == 0:
            self._progress.update(training.step, training.config.steps, "", **figures)
