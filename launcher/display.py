"""What the terminal shows while stages run: a bar each, or now and then a line where there is no terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

import data.progress
from launcher.units import duration, short

LINE_SECONDS = 30
"""Between two lines about one stage where there is no terminal."""
DRAW_SECONDS = 0.1


class Pace:
    """Seconds left, from the speed since the first report: an early resume or a new phase starts it afresh."""

    def __init__(self) -> None:
        self._first: tuple[float, int, int] | None = None

    def left(self, row: dict[str, Any]) -> float | None:
        done, total = row["done"], row["total"]
        if self._first is None or self._first[2] != total or done < self._first[1]:
            self._first = row["time"], done, total
        passed, made = row["time"] - self._first[0], done - self._first[1]
        return passed * (total - done) / made if made and passed > 0 else None


class Display:
    """Use as a context manager. Everything is drawn when `update` is called: there is no thread that could hang."""

    def __init__(self, console: Console, folder: Path) -> None:
        self.console = console
        self._folder = folder
        self._bars = _bars(console)
        self._tasks: dict[str, TaskID] = {}
        self._pace: dict[str, Pace] = {}
        self._lines: dict[str, float] = {}

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def begin(self, stage: str, how: str = "") -> None:
        self._pace[stage], self._lines[stage] = Pace(), time.monotonic()
        if self.console.is_terminal:
            self._tasks[stage] = self._bars.add_task(stage, total=None, text=escape(f"starting {how}".rstrip()))
        else:
            self.say(f"{stage}: started{escape(f' {how}') if how else ''}")

    def end(self, stage: str) -> None:
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))

    def update(self, stages: list[str]) -> None:
        """Draws what the stages that run have last reported."""
        for stage in stages:
            row = read_progress(self._folder / f"{stage}.json")
            if row is None:
                continue
            text = describe(row, self._pace[stage].left(row))
            if self.console.is_terminal:
                self._bars.update(self._tasks[stage], completed=row["done"], total=row["total"], text=escape(text))
            elif time.monotonic() - self._lines[stage] > LINE_SECONDS:
                self._lines[stage] = time.monotonic()
                self.say(f"{stage}: {escape(text)}")
        if self.console.is_terminal:
            self._bars.refresh()


class ConsoleProgress(data.progress.Progress):
    """Progress of work in this process: a bar, or now and then a line where there is no terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bars = _bars(console)
        self._task = self._bars.add_task("starting", total=None, text="")
        self._pace = Pace()
        self._drawn = 0.0 if console.is_terminal else time.monotonic()

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def update(self, done: int, total: int, message: str = "", **figures: float) -> None:
        now = time.monotonic()
        row = {"done": done, "total": total, "message": "", "figures": figures, "time": now}
        text = describe(row, self._pace.left(row))
        if now - self._drawn < (DRAW_SECONDS if self._console.is_terminal else LINE_SECONDS):
            return
        self._drawn = now
        if self._console.is_terminal:
            self._bars.update(
                self._task,
                completed=done,
                total=total,
                description=escape(message),
                text=escape(text),
                refresh=True,
            )
        else:
            self._console.print(f"{message}: {text}", highlight=False, markup=False, soft_wrap=True)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<11}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[text]}"),
        console=console,
        auto_refresh=False,
        transient=True,
    )


def read_progress(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def describe(row: dict[str, Any], seconds_left: float | None) -> str:
    """`120/600  loss 3.21  2 min left  synthesising`."""
    parts = [f"{row['done']:,}/{row['total']:,}"]
    parts += [f"{name.replace('_', ' ')} {short(value)}" for name, value in row["figures"].items()]
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join([*parts, row["message"]]).rstrip()
