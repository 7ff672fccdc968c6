"""`stretto status`: where every stage of a run is, read from what the run leaves on the disk. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from data.lock import holder
from launcher.backends.others import unsaid
from launcher.hosts import LOCALHOST
from launcher.recipe import RECIPE
from launcher.run_folder import may_run, read_state
from launcher.stages import STAGES
from launcher.units import counted, duration, short
from model.artifact import MANIFEST
from model.errors import UserError
from trainer.metrics_reader import METRICS, last_metrics

ORDER = tuple(stage.name for stage in STAGES)
TRAINED = tuple(stage.name for stage in STAGES if stage.trained)
REPORT = "report.html"
WATCH_SECONDS = 1.0
"""Between two looks at a run that is watched."""
SPEED = ("windows_per_second", "tokens_per_second", "mfu", "data_wait", "skipped")
"""What is shown of the newest row of a training, beside its loss; rows of earlier versions lack some."""
COLOURS = {"done": "green", "running": "cyan", "waiting": "dim", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class StageStatus:
    """One stage. Times in seconds; what is not known is None."""

    name: str
    state: str
    """waiting, running, done, failed or interrupted."""
    done: int | None = None
    """Steps of a trained stage; clips, passes ... of the others."""
    total: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    windows_per_second: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1."""
    data_wait: float | None = None
    """Share of the training time that was spent waiting for data."""
    skipped: int | None = None
    """Steps left out so far."""
    seconds: float | None = None
    """How long it took, or has run for, in all its attempts."""
    seconds_left: float | None = None
    reused: bool = False
    message: str = ""
    error: str | None = None
    """Why it failed; of a stage that waits, why it is started again."""
    hosts: str | None = None
    """The hosts and slots that it runs on, or ran on last."""
    job: str | None = None
    """What its cluster knows the job that runs by."""
    restarts: int = 0
    """How often it was started again by itself."""
    log: str | None = None
    """Relative to the run folder."""


@dataclass(frozen=True)
class RunStatus:
    run: Path
    recipe: str
    state: str
    """running, done, failed, interrupted or waiting."""
    stages: list[StageStatus]
    report: str | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "format_version": 1, "run": str(self.run)}


def read_status(run: Path) -> RunStatus:
    """The state of every stage of the run. Raises UserError where `run` is not a run folder."""
    recipe = _read_recipe(run)
    if recipe is None:
        raise UserError(f"{run} is not a run folder: it has no {RECIPE}.")
    record, launcher = read_state(run)["stages"], holder(run) is not None
    for name, changes in unsaid(record).items():
        record[name] |= changes
    stages = [_stage(run, name, record.get(name, {}), recipe, launcher) for name in ORDER]
    states = [stage.state for stage in stages]
    submitted = any(stage.state == "waiting" and stage.job for stage in stages)
    return RunStatus(
        run=run,
        recipe=recipe.get("name", "?"),
        state=_overall(states, launcher or submitted or "running" in states),
        stages=stages,
        report=REPORT if (run / REPORT).is_file() else None,
    )


def _overall(states: list[str], alive: bool) -> str:
    if alive:
        return "running"
    if all(state == "done" for state in states):
        return "done"
    # What was only waiting when its launcher died was interrupted with it, if anything had been done at all.
    worst = next((state for state in ("failed", "interrupted") if state in states), None)
    return worst or ("interrupted" if "done" in states else "waiting")


def _stage(run: Path, name: str, record: dict[str, Any], recipe: dict[str, Any], launcher: bool) -> StageStatus:
    made = (run / name / MANIFEST).is_file()
    state = record.get("state") or ("done" if made else "waiting")
    if state == "running" and not launcher and not may_run(run, name, record):
        # Its launcher was killed, and it has ended since.
        state = "done" if made else "interrupted"
    progress = _read_json(run / "progress" / f"{name}.json")
    log = Path("logs") / f"{name}.log"
    known: dict[str, Any] = {
        "name": name,
        "state": state,
        "seconds": record.get("seconds"),
        "reused": bool(record.get("reused")),
        "error": record.get("error"),
        "hosts": record.get("hosts"),
        "job": record.get("job"),
        "restarts": record.get("restarts") or 0,
        "log": log.as_posix() if (run / log).is_file() else None,
    }
    started = record.get("started") or 0
    if state == "running" and started:
        known["seconds"] = (record.get("seconds") or 0) + time.time() - started
    if state in ("running", "interrupted", "failed") and progress and progress["time"] >= started:
        known |= {"done": progress["done"], "total": progress["total"], "message": progress["message"]}
        if state == "running":
            known["seconds_left"] = _seconds_left(progress)
    if name in TRAINED and state != "waiting":
        known |= _training(run / name / METRICS, recipe, name, state)
    return StageStatus(**known)


def _seconds_left(progress: dict[str, Any]) -> float | None:
    """What is left, at the speed so far."""
    done, passed = progress["done"], progress["time"] - progress["started"]
    return passed * (progress["total"] - done) / done if done else None


def _training(path: Path, recipe: dict[str, Any], name: str, state: str) -> dict[str, Any]:
    """Step, losses, speed and time left of a trained stage, from the newest rows of its metrics."""
    train, validation = last_metrics(path, "train"), last_metrics(path, "validation")
    found: dict[str, Any] = {"validation_loss": validation["loss"] if validation else None}
    if train is None:
        return found
    found |= {"done": train["step"], "loss": train["loss"]}
    found |= {figure: train.get(figure) for figure in SPEED}
    settings = recipe.get("stages", {}).get(name, {}).get("train", {})
    if "steps" in settings:
        found["total"] = settings["steps"]
        if state == "running" and train["windows_per_second"]:
            windows = (settings["steps"] - train["step"]) * settings["global_batch"]
            found["seconds_left"] = windows / train["windows_per_second"]
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError:  # torn as a machine lost power
        return None


def _read_recipe(run: Path) -> dict[str, Any] | None:
    # Not checked as a recipe: the run of another version should still show where it is.
    try:
        return yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except yaml.YAMLError:
        raise UserError(f"{run / RECIPE} is damaged: it does not read as YAML.") from None


def print_status(run: Path, as_json: bool, console: Console) -> None:
    """Shows the state of a run as a table, or as one JSON object."""
    status = read_status(run)
    if as_json:
        print(json.dumps(status.to_json(), indent=2), file=console.file)
        return
    for line in _shown(status):
        console.print(line, highlight=False)


def watch_status(run: Path, console: Console) -> None:
    """Shows the state of a run and keeps it up to date, until nothing of it runs any more."""
    status = read_status(run)
    with Live(Group(*_shown(status)), console=console, auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(WATCH_SECONDS)
            status = read_status(run)
            live.update(Group(*_shown(status)), refresh=True)


def _shown(status: RunStatus) -> Iterator[RenderableType]:
    run, colour = status.run, COLOURS[status.state]
    yield Text.from_markup(f"{escape(str(run))}: recipe {escape(status.recipe)}, [{colour}]{status.state}[/]")
    yield _table(status)
    for stage in status.stages:
        speed = _speed(stage)
        if speed:
            yield Text(f"{stage.name}: {speed}")
    for stage in status.stages:
        if stage.error:
            yield Text.from_markup(f"[{COLOURS[stage.state]}]{stage.name}[/]: {escape(stage.error)}")
    logs = [stage.log for stage in status.stages if stage.log and stage.state in ("running", "failed", "interrupted")]
    if logs:
        yield Text(f"Logs: {', '.join(str(run / log) for log in logs)}")
    if status.state in ("interrupted", "failed"):
        yield Text("The same `stretto run` command goes on from here.")
    if status.report:
        yield Text(f"Report: {run / status.report}")


def _table(status: RunStatus) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    hosts = any(stage.hosts and not stage.hosts.startswith(LOCALHOST) for stage in status.stages)
    restarts = any(stage.restarts for stage in status.stages)
    more = [*["restarts"] * restarts, *["hosts"] * hosts]
    for column in ("stage", "state", "done", "loss", "valid.", "windows/s", "time", *more):
        left = column in ("stage", "state", "hosts")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "hosts")
    for stage in status.stages:
        also = [*[str(stage.restarts or "")] * restarts, *[escape(stage.hosts or "")] * hosts]
        table.add_row(
            stage.name,
            f"[{COLOURS[stage.state]}]{stage.state}[/]" + (" (kept)" if stage.reused else ""),
            _done(stage),
            _or_blank(stage.loss, "{:.3f}"),
            _or_blank(stage.validation_loss, "{:.3f}"),
            _or_blank(stage.windows_per_second, "{:.0f}"),
            _time(stage),
            *also,
        )
    return table


def _done(stage: StageStatus) -> str:
    if stage.done is None:
        return ""
    return f"{stage.done:,} / {stage.total:,}" if stage.total is not None else f"{stage.done:,}"


def _speed(stage: StageStatus) -> str:
    """How fast a stage trains, or trained at its last log, what it waits for and what it has left out."""
    parts = [f"{short(stage.tokens_per_second)} tokens/s"] if stage.tokens_per_second is not None else []
    if stage.mfu is not None:
        parts.append(f"MFU {stage.mfu:.1%}")
    if stage.data_wait is not None:
        parts.append(f"{stage.data_wait:.0%} waiting for data")
    if stage.skipped:
        parts.append(f"{counted(stage.skipped, 'step')} left out")
    return ", ".join(parts)


def _time(stage: StageStatus) -> str:
    """What is left of a running stage, what another has taken."""
    if stage.seconds_left is not None:
        return f"{duration(stage.seconds_left)} left"
    return duration(stage.seconds) if stage.seconds else ""


def _or_blank(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
