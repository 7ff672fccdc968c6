"""Clusters that start jobs themselves: all stages are submitted at once, and nothing of ours has to stay alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher import runner, stages
from launcher.attempts import Attempts
from launcher.backends import BatchBackend, Job
from launcher.backends.others import check_others, over
from launcher.graph import Origin, StageState, origins, plan_stages, state_of
from launcher.outcome import make_way
from launcher.placement import Share, count
from launcher.places import check_places
from launcher.recipe import Recipe
from launcher.restarts import USER
from launcher.run_folder import RunFolder, check_owner, read_state
from launcher.stage import Stage
from launcher.units import counted
from model.errors import UserError
from trainer.exit_codes import DIVERGED, SAVED

POLL_SECONDS = 5.0
SILENCE_SECONDS = 900.0
"""How long a cluster that is waited for may give no answer."""
INTERRUPTED = 130


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
        runner.print_plan(console, states, todo)
        text = backend.dry_run(jobs_for(recipe, path.absolute(), todo, backend, {}))
        console.print(f"\n{text}".rstrip(), highlight=False, soft_wrap=True, markup=False)
        return 0
    found = origins(recipe)
    with RunFolder.opened(path, recipe) as folder:
        check_others(folder, recipe, backend.name)
        jobs_there = living(folder, backend)
        states = state_of(folder.path, recipe, found)  # later: what ends in between is seen as done, not as gone
        todo = plan_stages(states, only)
        lives = still_wanted(folder, found, states, backend, jobs_there)
        new = [stage for stage in todo if stage.name not in lives]
        jobs = _checked(folder, recipe, found, new, backend, lives)
        folder.adopt(recipe)
        for name in (name for name, state in states.items() if state.done):
            # What a job has said of it before no longer counts: it may have been made by hand since.
            folder.record(name, state="done", reused=True, error=None, job=None, made_from=found[name].to_json())
        if not todo:
            runner.print_up_to_date(console, path, only)
            return 0
        handles = dict(lives)
        left = submit_all(folder, found, states, jobs, backend, handles, console) if jobs else None
        console.print(_table(todo, handles, lives, {job.stage.name: job.share for job in jobs}))
        if left is not None:
            console.print(left, highlight=False, soft_wrap=True, markup=False)
            return 0
    return wait_for(folder.path, backend, handles, console) if wait else 0


def living(folder: RunFolder, backend: BatchBackend) -> dict[str, str]:
    """Handles of the jobs that an earlier command has submitted and that have not ended, by their stages."""
    handles: dict[str, str] = {}
    listed = backend.listed()
    for name in (stage.name for stage in stages.STAGES):
        handle = _noted(folder.entry(name), backend)
        if handle is None and (handle := listed.get(name)) is not None:
            folder.record(name, state="waiting", error=None, job=handle, backend=backend.name)
            folder.state = read_state(folder.path)  # with what the job has said
        if handle is not None:
            handles[name] = handle
    return handles


def still_wanted(
    folder: RunFolder,
    found: Mapping[str, Origin],
    states: Mapping[str, StageState],
    backend: BatchBackend,
    handles: Mapping[str, str],
) -> dict[str, str]:
    """Those of the living jobs that go on. One that waits for what nobody makes any more, since that was cancelled, is
    called off.

    Raises UserError where one makes something else than what is asked for now.
    """
    kept: dict[str, str] = {}
    problems = []
    for stage in (stage for stage in stages.STAGES if stage.name in handles):
        name, handle, entry = stage.name, handles[stage.name], folder.entry(stage.name)
        never = any(not states[need].done and need not in kept for need in stage.needs)
        if never and backend.joins and entry["state"] == "waiting":
            backend.cancel(handle)
            continue
        kept[name] = handle
        made_from = entry.get("made_from")
        if made_from is None or Origin(**made_from).fingerprint != found[name].fingerprint:
            problems.append(
                f"{name} is being made by job {handle}, as an earlier command with another recipe asked for: "
                f"`stretto stop {folder.path}` ends it."
            )
    if problems:
        raise UserError("\n".join(problems))
    return kept


def _noted(entry: Mapping[str, Any], backend: BatchBackend) -> str | None:
    """The job of a stage that `state.json` knows, where it has not ended."""
    handle = entry.get("job")
    # A job that has said how it ended may take a moment longer to be gone.
    if handle is None or entry.get("backend") != backend.name or over(entry):
        return None
    return handle if backend.poll(handle) is None else None


def _checked(
    folder: RunFolder,
    recipe: Recipe,
    found: dict[str, Origin],
    new: Sequence[Stage],
    backend: BatchBackend,
    lives: Mapping[str, str],
) -> list[Job]:
    """The jobs to submit. Raises one UserError with all that is wrong."""
    if not new:
        return []
    problems = []
    if lives and not backend.joins:
        problems.append(
            f"{', '.join(lives)} of an earlier submission still {'runs' if len(lives) == 1 else 'run'}, and new jobs "
            f"cannot wait for that: `stretto stop {folder.path}` lets it save, then give the command again."
        )
    jobs: list[Job] = []
    checks: list[Callable[[], object]] = [
        lambda: folder.check_space(runner.space_needed(recipe, new)),
        lambda: check_places(recipe, found, new),
        lambda: jobs.extend(jobs_for(recipe, folder.path, new, backend, lives)),
        lambda: backend.check(jobs) if jobs else None,
    ]
    problems += runner.problems_of(checks)
    if problems:
        raise UserError("\n".join(problems))
    return jobs


def jobs_for(
    recipe: Recipe, run: Path, stages: Sequence[Stage], backend: BatchBackend, lives: Mapping[str, str]
) -> list[Job]:
    """A job for each of `stages`, which waits for those that `lives` has of what it needs."""
    shares = backend.shares(recipe, stages)
    return [
        Job(run, recipe, stage, shares[stage.name], after=tuple(lives[need] for need in stage.needs if need in lives))
        for stage in stages
    ]


def submit_all(
    folder: RunFolder,
    found: Mapping[str, Origin],
    states: Mapping[str, StageState],
    jobs: Sequence[Job],
    backend: BatchBackend,
    handles: dict[str, str],
    console: Console,
) -> str | None:
    """Makes way for `jobs` and submits them; their handles join `handles`. Where a submission is refused, those before
    it stay: the same command goes on from there."""
    for job in jobs:
        name, origin = job.stage.name, found[job.stage.name]
        state, entry = states[name], folder.entry(name)
        if entry.get("job") is not None:
            unsaid = Attempts(folder.path, name, entry["job"]).end_unsaid()
            folder.record(name, job=None, seconds=(entry.get("seconds") or 0) + unsaid)
        previous = make_way(folder, job.stage, origin, state.state == "outdated")
        if previous is not None:
            console.print(f"{name}: outdated ({'; '.join(state.reasons)}); moved to {previous}", markup=False)
        (folder.path / "progress" / f"{name}.json").unlink(missing_ok=True)
        # The job may start before its number is known here.
        noted = {"backend": backend.name, "made_from": origin.to_json(), "hosts": None}
        folder.record(name, state="waiting", error=None, **noted)

    def submitted(name: str, handle: str) -> None:
        handles[name] = handle
        folder.record(name, job=handle)

    return backend.submit_all(jobs, submitted)


def _table(
    todo: Sequence[Stage], handles: Mapping[str, str], lives: Mapping[str, str], shares: Mapping[str, Share]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "job", "takes", "waits for"):
        table.add_column(column, overflow="fold")
    for stage in todo:
        share = shares.get(stage.name, ())
        nodes = f" on {len(share)} nodes" if len(share) > 1 else ""
        waits = ", ".join(handles[need] for need in stage.needs if need in handles)
        job = handles[stage.name] + (", which lives" if stage.name in lives else "")
        table.add_row(stage.name, escape(job), counted(count(share), "rank") + nodes if share else "", escape(waits))
    return table


def wait_for(run: Path, backend: BatchBackend, handles: Mapping[str, str], console: Console) -> int:
    """Waits for jobs to end, and says of each how. Returns 0, 1 when a stage failed, 2 when only by what the user can
    put right, 130 when some were merely stopped. Raises UserError where the cluster has not answered for too long."""
    codes: dict[str, int] = {}
    silent: float | None = None
    while left := [name for name in handles if name not in codes]:
        for name in left:
            try:
                ended = backend.poll(handles[name])
            except UserError as silence:  # its controller may be about to start again
                now = time.monotonic()
                if silent is None:
                    silent = now
                    console.print(f"{silence}\nIt is asked again; the jobs go on.", markup=False, soft_wrap=True)
                elif now - silent > SILENCE_SECONDS:
                    raise
                break
            silent = None
            if ended is not None:
                codes[name] = ended.code
                error = read_state(run)["stages"][name].get("error")
                said = "done" if ended.code == 0 else f"not done{f': {error}' if error else ''}"
                console.print(f"{name}: {said}", markup=False, highlight=False, soft_wrap=True)
        if len(codes) < len(handles):
            time.sleep(POLL_SECONDS)
    failed = {code for code in codes.values() if code not in (0, SAVED)}
    if failed:
        return 2 if failed <= {USER, DIVERGED} else 1
    return INTERRUPTED if SAVED in codes.values() else 0
