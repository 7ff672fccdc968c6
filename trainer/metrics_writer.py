"""Where the figures of a training go: `metrics.jsonl`, TensorBoard and Weights & Biases. Rank 0 alone writes."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from model.errors import UserError
from trainer.metrics_reader import METRICS
from trainer.setup import StageSetup

WANDB_ID = "wandb-id"
"""File of a stage's folder with the name of its Weights & Biases run, which a resumed training goes on with."""


class MetricsWriter(Protocol):
    """One place where figures go."""

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Adds a row; `step` counts finished optimizer steps."""

    def close(self) -> None: ...


def writers(setup: StageSetup, start: int) -> list[MetricsWriter]:
    """All that the recipe asks for, for a training that goes on from step `start`. Raises UserError."""
    found: list[MetricsWriter] = [JsonLines(setup.folder / METRICS, start), TensorBoard(setup.folder, start)]
    if setup.config.train.wandb is not None:
        found.append(WeightsAndBiases(setup, setup.config.train.wandb))
    return found


class JsonLines:
    """`metrics.jsonl`, from which rows that an interrupted training left after step `start` are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._drop_after(start)
        self._file = path.open("a")

    def _drop_after(self, start: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= start] if start else []
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        plain = finite(figures)
        marked = plain if plain == figures else {**plain, "finite": False}
        row = {"kind": kind, "step": step, "time": time.time(), **marked}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines but for one that a killed training did not finish."""
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            json.loads(line)
            yield line


def finite(value: Any) -> Any:
    """`value` with None for each number in it that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """The numbers of all rows as curves, `kind/name`."""

    def __init__(self, folder: Path, start: int) -> None:
        # Of an interrupted training it hides what is at this step or later.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        for name, value in scalars(figures):
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, nested names joined by slashes."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from scalars({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


class WeightsAndBiases:
    """A run of a Weights & Biases project, the same one for a training that goes on.

    Keys come from the package's own places (`wandb login`, WANDB_API_KEY); none is read or logged here. Raises
    UserError where the package is missing or does not start.
    """

    def __init__(self, setup: StageSetup, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"stages.{setup.stage}.train.wandb needs a package that is missing: pip install 'stretto[wandb]'"
            ) from None
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(setup.folder / WANDB_ID),
                resume="allow",
                name=f"{setup.run.name}-{setup.stage}",
                group=setup.run.name,
                dir=str(setup.folder),
                config={"seed": setup.seed, **setup.config.model_dump(mode="json")},
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not start (stages.{setup.stage}.train.wandb={project}): {error}\n"
                "Run `wandb login`, set WANDB_MODE=offline, or leave train.wandb out."
            ) from None
        # Its own step may only grow, and a training that goes on logs some steps again.
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in scalars(figures)}})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    """The id in the file, made on the first call."""
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
