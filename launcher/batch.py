"""Clusters that start jobs themselves: all stages are submitted at once, and nothing of ours has to stay alive."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher import runner
from launcher.backends import Backend, Job
from launcher.graph import Origin, StageState, origins, plan_stages, state_of
from launcher.outcome import make_way
from launcher.placement import Share, count
from launcher.places import check_places
from launcher.recipe import Recipe
from launcher.run_folder import RunFolder, check_owner, read_state
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

    def script(self, job: Job) -> str:
        """What the cluster is given of a job."""


def run(
    recipe: Recipe,
    path: Path,
    backend: BatchBackend,
    only: Sequence[str] = (),
    dry_run: bool = False,
    wait: bool = False,
    console: Console | None = None,
) -> int:
    """As `launcher.runner.run`, on a cluster that starts jobs itself: returns when all are submitted, or have ended
    where it is to `wait`. Raises UserError with all that can be said before anything is submitted."""
    console = console or Console()
    if dry_run:
        check_owner(path, recipe)
        states = state_of(path, recipe)
        todo = plan_stages(states, only)
        runner._print_plan(console, states, todo)
        print_jobs(recipe, path.absolute(), todo, backend, console)
        return 0
    found = origins(recipe)
    with RunFolder.opened(path, recipe) as folder:
        states = state_of(folder.path, recipe, found)
        todo = plan_stages(states, only)
        lives = living(folder, found, backend)
        if new := [stage for stage in todo if stage.name not in lives]:
            folder.check_space(runner.space_needed(recipe, new))
            check_places(recipe, found, new)
            backend.check(recipe, new)
        folder.adopt(recipe)
        for name in (name for name, state in states.items() if state.done):
            folder.record(name, state="done", reused=True, error=None, made_from=found[name].to_json())
        if not todo:
            console.print(f"{path}: everything is up to date.", highlight=False, soft_wrap=True, markup=False)
            return 0
        handles = submit_all(folder, recipe, found, states, todo, backend, lives, console)
    return wait_for(folder.path, backend, handles, console) if wait else 0


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
    lives: Mapping[str, str],
    console: Console,
) -> dict[str, str]:
    """Submits a job for each stage in `todo` that none `lives` for; each waits for those that make what it needs.

    Returns the handles of all that live now, by their stages, and prints them. Where a submission is refused, those
    before it stay: the same command goes on from there.
    """
    handles, shares = dict(lives), backend.shares(recipe, todo)
    for stage in todo:
        if stage.name in lives:
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
    console.print(_table(todo, handles, lives, shares))
    return handles


def print_jobs(recipe: Recipe, run: Path, todo: Sequence[Stage], backend: BatchBackend, console: Console) -> None:
    """What would be submitted, job by job; names of stages stand for the numbers that jobs will have."""
    shares, names = backend.shares(recipe, todo), {stage.name for stage in todo}
    for stage in todo:
        after = tuple(need for need in stage.needs if need in names)
        text = backend.script(Job(run, recipe, stage, shares[stage.name], after=after))
        console.print(f"\n{stage.name}:\n{text}".rstrip(), highlight=False, soft_wrap=True, markup=False)


def _table(
    todo: Sequence[Stage], handles: Mapping[str, str], lives: Mapping[str, str], shares: Mapping[str, Share]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "job", "takes", "waits for"):
        table.add_column(column, overflow="fold")
    for stage in todo:
        share = shares[stage.name]
        nodes = f" on {len(share)} nodes" if len(share) > 1 else ""
        waits = ", ".join(handles[need] for need in stage.needs if need in handles)
        job = handles[stage.name] + (", which lives" if stage.name in lives else "")
        table.add_row(stage.name, escape(job), counted(count(share), "rank") + nodes, escape(waits))
    return table


def wait_for(run: Path, backend: BatchBackend, handles: Mapping[str, str], console: Console) -> int:
    """Waits for jobs to end, and says of each how. Returns 0, or what the first that failed ended with."""
    left, code = dict(handles), 0
    while left:
        for name, handle in list(left.items()):
            ended = backend.poll(handle)
            if ended is None:
                continue
            del left[name]
            entry = read_state(run)["stages"][name]
            said = f": {entry['error']}" if entry.get("error") else ""
            console.print(f"{name}: {'done' if ended.code == 0 else 'not done'}{said}", markup=False, highlight=False)
            code = code or ended.code
        if left:
            time.sleep(POLL_SECONDS)
    return code
