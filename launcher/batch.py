"""Clusters that start jobs themselves: all stages are submitted at once, and nothing of ours has to stay alive."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.backends import Backend, Job
from launcher.graph import Origin, StageState
from launcher.outcome import make_way
from launcher.placement import Share, count
from launcher.recipe import Recipe
from launcher.run_folder import RunFolder, read_state
from launcher.stage import Stage
from launcher.units import counted
from model.errors import UserError

POLL_SECONDS = 5.0
ENDED = ("done", "failed", "interrupted")


class BatchBackend(Backend, Protocol):
    """A cluster with an engine of its own for jobs that depend on each other."""

    def shares(self, recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Share]:
        """What each stage will take."""

    def check(self, recipe: Recipe, stages: Sequence[Stage]) -> None:
        """Raises UserError with all that the cluster would refuse."""


def living(folder: RunFolder, found: Mapping[str, Origin], backend: BatchBackend) -> dict[str, str]:
    """Handles of the jobs that an earlier command has submitted and that have not ended, by their stages.

    Raises UserError where one makes something else than what is asked for now.
    """
    handles, problems = {}, []
    for name, entry in folder.state["stages"].items():
        handle = entry.get("job")
        # A job that has said how it ended may take a moment longer to be gone.
        if handle is None or entry.get("backend") != backend.name or entry["state"] in ENDED:
            continue
        if backend.poll(handle) is not None:
            continue
        handles[name] = handle
        if Origin(**entry["made_from"]).fingerprint != found[name].fingerprint:
            problems.append(
                f"{name} is being made by job {handle}, as an earlier command with another recipe asked for: "
                f"`stretto stop {folder.path}` ends it."
            )
    if problems:
        raise UserError("\n".join(problems))
    return handles


def submit_all(
    folder: RunFolder,
    recipe: Recipe,
    found: Mapping[str, Origin],
    states: Mapping[str, StageState],
    todo: Sequence[Stage],
    backend: BatchBackend,
    console: Console,
) -> dict[str, str]:
    """Submits a job for each stage in `todo` that none lives for; each waits for those that make what it needs.

    Returns the handles of all that live, by their stages, and prints them. Where a submission is refused, those before
    it stay: the same command goes on from there.
    """
    handles = living(folder, found, backend)
    kept, shares = set(handles), backend.shares(recipe, todo)
    for stage in todo:
        if stage.name in kept:
            continue
        after = tuple(handles[need] for need in stage.needs if need in handles)
        state, origin = states[stage.name], found[stage.name]
        previous = make_way(folder, stage, origin, state.state == "outdated")
        if previous is not None:
            console.print(f"{stage.name}: outdated ({'; '.join(state.reasons)}); moved to {previous}", markup=False)
        (folder.path / "progress" / f"{stage.name}.json").unlink(missing_ok=True)
        # The job may start before its number is known here.
        noted = {"backend": backend.name, "made_from": origin.to_json(), "hosts": None}
        folder.record(stage.name, state="waiting", error=None, job=None, **noted)
        handles[stage.name] = backend.submit(Job(folder.path, recipe, stage, shares[stage.name], after=after))
        folder.record(stage.name, job=handles[stage.name])
    console.print(_table(todo, handles, kept, shares))
    return handles


def _table(todo: Sequence[Stage], handles: Mapping[str, str], kept: set[str], shares: Mapping[str, Share]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "job", "takes", "waits for"):
        table.add_column(column, overflow="fold")
    for stage in todo:
        share = shares[stage.name]
        nodes = f" on {len(share)} nodes" if len(share) > 1 else ""
        waits = ", ".join(handles[need] for need in stage.needs if need in handles)
        job = handles[stage.name] + (", which lives" if stage.name in kept else "")
        table.add_row(stage.name, escape(job), counted(count(share), "rank") + nodes, escape(waits))
    return table


def wait_for(folder: RunFolder, backend: BatchBackend, handles: Mapping[str, str], console: Console) -> int:
    """Waits for jobs to end, and says of each how. Returns 0, or what the first that failed ended with."""
    left, code = dict(handles), 0
    while left:
        for name, handle in list(left.items()):
            ended = backend.poll(handle)
            if ended is None:
                continue
            del left[name]
            entry = read_state(folder.path)["stages"][name]
            said = f": {entry['error']}" if entry.get("error") else ""
            console.print(f"{name}: {'done' if ended.code == 0 else 'not done'}{said}", markup=False, highlight=False)
            code = code or ended.code
        if left:
            time.sleep(POLL_SECONDS)
    return code
