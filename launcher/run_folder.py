"""The run folder as the launcher keeps it: one writer at a time, a record of what ran, nothing half there."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.lock import LOCK, locked
from launcher.job_record import alive, elsewhere, read_job
from launcher.recipe import RECIPE, Recipe, dump_recipe, read_run_recipe
from launcher.units import size
from model import artifact
from model.errors import UserError

STATE = "state.json"
HISTORY = "history.jsonl"
"""A line for each attempt at a stage that has ended."""
PREVIOUS = "previous"
ENDED = ("done", "failed", "interrupted")
"""States of stages of which nothing runs or waits to run."""
DIRECT = "direct"
"""The backend of jobs that were started from here; others are a cluster's."""


def read_state(run: Path) -> dict[str, Any]:
    """What `state.json` records: `{"format_version", "recipe", "stages": {name: entry}}`.

    An entry has `state` ("waiting", "running", "done", "failed" or "interrupted"), `reused` (found up to date by the
    last run), `error`, the `pid` and `pid_started` of the stage's process group, `started` and `finished` (seconds
    since 1970), `seconds` it took in all its attempts, and `made_from`: what its fingerprint is made of. Raises
    UserError where a newer Stretto wrote it or it does not read.
    """
    path = run / STATE
    try:
        state = json.loads(path.read_text())
        version = state["format_version"]
    except FileNotFoundError:
        return {"format_version": artifact.FORMAT_VERSION, "stages": {}}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged. Remove it and run again: what is finished is kept.") from None
    if version > artifact.FORMAT_VERSION:
        raise UserError(
            f"{run} was made by a newer Stretto (format {version}; this one knows {artifact.FORMAT_VERSION}): "
            "upgrade Stretto, or choose another folder with -o."
        )
    for name, entry in state["stages"].items():
        said = read_job(run, name)
        if said and entry.get("job") is not None and said.get("job") == entry["job"]:
            entry.update(said)
    return state


class RunFolder:
    """A run folder that this process works in. Use `with RunFolder.opened(path, recipe) as folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.state: dict[str, Any] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, recipe: Recipe) -> Iterator[RunFolder]:
        """Makes or takes over a run folder for `recipe`, alone: what a dead run left half written is cleared away.

        Raises UserError where another process runs there, or the folder is something else's.
        """
        check_owner(path, recipe)
        folder = cls(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}. Choose another folder with -o.") from None
        with locked(folder.path):
            folder.state = read_state(folder.path)
            folder._clear_leftovers()
            yield folder

    def adopt(self, recipe: Recipe) -> None:
        """Makes `recipe` the one this folder is built by."""
        _write_text(self.path / RECIPE, dump_recipe(recipe))
        self.state.update(format_version=artifact.FORMAT_VERSION, recipe=recipe.name)
        self._write()

    def record(self, stage: str, **entry: Any) -> None:
        """Changes what `state.json` says of a stage."""
        self.state["stages"].setdefault(stage, {}).update(entry)
        self._write()

    def entry(self, stage: str) -> dict[str, Any]:
        return self.state["stages"].get(stage, {})

    def set_aside(self, stage: str) -> Path | None:
        """Moves the outputs of an outdated stage to `previous/`, in place of what was moved there before.

        Raises UserError that names the holder where another job has locked them.
        """
        path, previous = self.path / stage, self.path / PREVIOUS / stage
        if not path.exists():
            return None
        with locked(path):
            if previous.exists():
                shutil.rmtree(previous)
            previous.parent.mkdir(exist_ok=True)
            path.rename(previous)
        return previous

    def check_space(self, needed: int) -> None:
        """Raises UserError when the disk has less free than about `needed` bytes."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"the disk of {self.path} has {size(free)} free; this run needs about {size(needed)}. "
                "Make room, or choose a folder on another disk with -o."
            )

    def _write(self) -> None:
        artifact.write_json(self.path / STATE, self.state)

    def running(self) -> set[str]:
        """The stages that may still run, by what is known of their jobs here."""
        return {name for name, entry in self.state["stages"].items() if may_run(self.path, name, entry)}

    def _clear_leftovers(self) -> None:
        """Removes what a killed process was writing, and gives back what it was about to replace; what still runs is
        left alone."""
        running = self.running()
        for folder in (self.path, *self.path.glob("*/"), *self.path.glob("*/checkpoints/")):
            if not folder.is_dir() or folder.name == PREVIOUS or running & set(folder.relative_to(self.path).parts):
                continue
            for partial in folder.glob(f".*{artifact.PARTIAL}*"):
                if not any(partial.name.startswith(f".{name}{artifact.PARTIAL}") for name in running):
                    _remove(partial)
            if (folder / artifact.MANIFEST).exists() and not folder.name.endswith(artifact.UNFINISHED):
                shutil.rmtree(folder / artifact.WORK, ignore_errors=True)
            for old in folder.glob(".*.old"):
                place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
                _remove(old) if place.exists() else old.rename(place)
        for torn in (self.path / "progress").glob(".*"):
            _remove(torn)


def remember(
    run: Path, stage: str, attempt: int, hosts: str, seconds: float, code: int | None, lost: Sequence[str] = ()
) -> None:
    """Appends to the run's history an attempt at a stage that has ended: with `code`, or None where nobody saw it."""
    fact = {"stage": stage, "attempt": attempt, "hosts": hosts, "seconds": round(seconds, 3), "code": code}
    line = json.dumps({"time": round(time.time(), 3), **fact, "lost": list(lost)}) + "\n"
    with (run / HISTORY).open("ab", buffering=0) as file:
        file.write(line.encode())  # in one piece, since jobs of a cluster write here side by side


def may_run(run: Path, stage: str, entry: Mapping[str, Any]) -> bool:
    """Whether the job of a stage may still run, by what `state.json` says of it and what can be seen here."""
    handle = entry.get("job")
    if entry.get("state") != "running" or handle is None:
        return False
    if (entry.get("backend") or DIRECT) != DIRECT:
        return True
    return alive(handle) or elsewhere(run, stage, handle)


def check_owner(path: Path, recipe: Recipe) -> None:
    """Raises UserError unless `path` is new, empty, or the run folder of a recipe of that name."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another folder with -o.")
    names = {entry.name for entry in path.iterdir()} - {LOCK} if path.exists() else set()
    if not any(not name.startswith(f".{RECIPE}") for name in names):
        return
    if RECIPE not in names:
        raise UserError(f"{path} is not empty and not a run folder: choose another folder with -o.")
    read_state(path)
    made_by = read_run_recipe(path).name
    if made_by != recipe.name:
        raise UserError(f"{path} was made by recipe {made_by!r}, not {recipe.name!r}: choose another folder with -o.")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}{artifact.PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    artifact.sync(partial)
    partial.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
