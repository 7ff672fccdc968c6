"""Running a recipe: what is not up to date is made, and nothing is lost on the way."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launcher import stages
from launcher.backends import Job
from launcher.backends.direct import KILLED, Direct
from launcher.backends.others import check_others
from launcher.execution import Execution
from launcher.graph import Origin, StageState, origins, plan_stages, state_of
from launcher.hosts import LOCALHOST, Host, crossing, is_here, module_on, read_hostfile
from launcher.job import LEASE
from launcher.job_record import alive, elsewhere, supervisor
from launcher.outcome import make_way
from launcher.placement import Share, parse_share, shares
from launcher.places import check_places
from launcher.preflight import check_hosts
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.room import HostRoom, LocalRoom, Room
from launcher.run_folder import DIRECT, RunFolder, check_owner
from launcher.stage import Stage
from model import artifact
from model.config import STAGES as TRAINED
from model.counting import count_stage, token_fields
from model.errors import UserError
from model.fields import CONDITIONING, SEMANTIC


def run(
    recipe: Recipe,
    path: Path,
    only: Sequence[str] = (),
    dry_run: bool = False,
    console: Console | None = None,
    hostfile: Path | None = None,
) -> int:
    """Brings the run folder `path` up to date with `recipe`, or only the stages in `only`, on this machine or on the
    hosts of `hostfile`. Returns the exit code: 0, 1 when a stage failed, 2 when it failed by something the user can put
    right, 130 when interrupted.

    Raises UserError with all that can be said before anything starts.
    """
    console = console or Console()
    hosts = read_hostfile(hostfile) if hostfile else []
    if dry_run:
        _dry_run(recipe, path, only, hosts, console)
        return 0
    # Taken once: the user's files may change while the run goes on.
    found = origins(recipe)
    with RunFolder.opened(path, recipe) as folder:
        check_others(folder, recipe, DIRECT)
        check_survivors(folder, found, hosts)
        states = state_of(folder.path, recipe, found)
        chosen = plan_stages(states, only)
        # What an earlier launcher has left running is watched, whatever is asked for now.
        left = folder.running()
        todo = [one for one in stages.STAGES if one in chosen or (one.name in left and not states[one.name].done)]
        # Hosts may be lost while a run goes on: what still runs is taken over without them.
        addresses = _check(folder, recipe, found, todo, hosts, all_hosts=not left)
        folder.adopt(recipe)
        _note_states(folder, found, states, todo)
        if todo:
            room = _room(recipe, folder.path, hosts, todo)
            for host in hosts:
                if host.name not in addresses:
                    room.lose(host.name)
                    console.print(f"[yellow]{host.name}[/] cannot be reached; it is left out until it can.")
            backend = Direct(folder.path, hosts, addresses)
            code = Execution(folder, recipe, found, states, todo, console, backend, room).run()
            if code:
                return code
        else:
            print_up_to_date(console, path, only)
        if all(state.done for state in state_of(folder.path, recipe, found).values()):
            _report(folder.path, list(states), console)
        return 0


def _dry_run(recipe: Recipe, path: Path, only: Sequence[str], hosts: Sequence[Host], console: Console) -> None:
    check_owner(path, recipe)
    states = state_of(path, recipe)
    todo = plan_stages(states, only)
    print_plan(console, states, todo)
    backend = Direct(path.absolute(), hosts)
    _print_commands(console, backend, _room(recipe, path.absolute(), hosts, todo), recipe, path.absolute(), todo)


def _room(recipe: Recipe, run: Path, hosts: Sequence[Host], todo: Sequence[Stage]) -> Room:
    return HostRoom(recipe, hosts, shares(recipe, hosts, todo), run) if hosts else LocalRoom(recipe)


def _check(
    folder: RunFolder,
    recipe: Recipe,
    found: dict[str, Origin],
    todo: Sequence[Stage],
    hosts: Sequence[Host],
    all_hosts: bool,
) -> dict[str, str]:
    """Looks at all that a run will need and returns the addresses of `hosts`, by their names, without those that
    cannot be reached where they need not be `all_hosts`. Raises one UserError with all that is wrong."""
    addresses: dict[str, str] = {}
    needed = space_needed(recipe, todo)
    checks: list[Callable[[], object]] = [
        lambda: folder.check_space(needed),
        lambda: check_places(recipe, found, todo),
    ]
    if hosts:
        checks.append(lambda: shares(recipe, hosts, todo))
        checks.append(lambda: addresses.update(check_hosts(hosts, folder.path, all_hosts)))
    if problems := problems_of(checks):
        raise UserError("\n".join(problems))
    return addresses


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What the checks raise, so that all of it can be said at once."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def check_survivors(folder: RunFolder, found: dict[str, Origin], hosts: Sequence[Host]) -> None:
    """Notes as interrupted what an earlier launcher had left running and that has ended since.

    Raises UserError where something still runs that is not what is asked for now, runs elsewhere than on `hosts`, or
    may run under another machine's eyes.
    """
    problems = []
    known = {host.name for host in hosts} or {LOCALHOST}
    for name, entry in folder.state["stages"].items():
        if entry.get("state") != "running" or (entry.get("backend") or DIRECT) != DIRECT:
            continue
        handle = entry.get("job")
        if handle is None:  # a launcher was killed before it had started anything
            folder.record(name, state="interrupted")
        elif elsewhere(folder.path, name, handle):
            host = supervisor(handle).host
            problems.append(
                f"{name} was started on {host}, where it may still run: give the command there. If {host} is gone for "
                f"good, remove {folder.path / 'jobs' / name}.json first."
            )
        elif not alive(handle):
            remote = any(not is_here(part.host) for part in parse_share(entry["hosts"], hosts))
            if Direct(folder.path).poll(handle) == Ended(KILLED) and remote:
                time.sleep(LEASE)  # a host that was cut off as the supervisor died has not heard of it
            folder.record(name, state="interrupted", job=None)
        elif any(part.host not in known for part in parse_share(entry["hosts"], hosts)):
            problems.append(
                f"{name} still runs on {entry['hosts']}, as an earlier command asked for: give the same command, or "
                f"end it with `stretto stop {folder.path}`."
            )
        elif found[name].fingerprint != Origin(**entry["made_from"]).fingerprint:
            problems.append(
                f"{name} still runs, as an earlier command with another recipe asked for: `stretto stop {folder.path}` "
                "ends it."
            )
    if problems:
        raise UserError("\n".join(problems))


def print_up_to_date(console: Console, path: Path, only: Sequence[str]) -> None:
    what = f"{', '.join(only)} " if only else "everything "
    console.print(f"{path}: {what}is up to date.", highlight=False, soft_wrap=True, markup=False)


def print_plan(console: Console, states: dict[str, StageState], todo: list[Stage]) -> None:
    building = {stage.name for stage in todo}
    for name, state in states.items():
        verb = "keep" if state.done else "build" if state.state == "missing" else "rebuild"
        verb = "resume" if state.state == "partial" else verb
        verb = verb if state.done or name in building else "leave"
        reasons = f": {'; '.join(state.reasons)}" if state.reasons else ""
        console.print(f"{name:<11} {verb:<8} {state.state}{escape(reasons)}", highlight=False, soft_wrap=True)


def _note_states(folder: RunFolder, found: dict[str, Origin], states: dict[str, StageState], todo: list[Stage]) -> None:
    """Records which stages are kept and which wait, and what each is to be made from, so that it can also be started by
    hand; what still runs is to be taken over."""
    for stage in stages.STAGES:
        name, state = stage.name, states[stage.name]
        if folder.entry(name).get("state") == "running" and not state.done:
            continue
        if state.done:
            folder.record(name, state="done", reused=True, error=None, job=None, made_from=found[name].to_json())
            continue
        if state.state == "missing":
            folder.record(name, made_from=found[name].to_json())
            if stage.trained:
                make_way(folder, stage, found[name], outdated=False)
        if name in {stage.name for stage in todo}:
            folder.record(name, state="waiting", reused=False, error=None)


def _report(run: Path, names: Sequence[str], console: Console) -> None:
    """Prints the figures of a finished run, after writing its report unless there is one newer than all it shows."""
    from launcher.report import print_summary, write_report

    report = run / "report.html"
    newest = max((run / name / artifact.MANIFEST).stat().st_mtime for name in names)
    if not report.exists() or report.stat().st_mtime < newest:
        write_report(run)
    print_summary(run, console)


def space_needed(recipe: Recipe, todo: Sequence[Stage]) -> int:
    """A rough lower bound on the bytes that `todo` will write: audio of the built-in corpus, checkpoints, weights."""
    names = {stage.name for stage in todo}
    needed = 0
    if "corpus" in names and recipe.data.audio is None:
        needed += int(recipe.data.clips * recipe.data.clip_seconds * recipe.data.sample_rate * 2)
    fields = token_fields(recipe.encoders, recipe.quantizers)
    dims = {CONDITIONING: recipe.encoders.joint.dim, SEMANTIC: recipe.encoders.joint.dim}
    for name in TRAINED:
        stage = getattr(recipe.stages, name)
        parameters = count_stage(stage.model, fields, dims).parameters
        weights = 2 * 4 * parameters  # the stage's own and the bundle's
        # A checkpoint has bf16 weights and three fp32 copies; the oldest goes only after a new one is there.
        checkpoints = (stage.train.keep_last + 1) * 14 * parameters
        needed += weights + checkpoints if name in names else 0
    return needed


def _print_commands(
    console: Console, backend: Direct, room: Room, recipe: Recipe, run: Path, todo: Sequence[Stage]
) -> None:
    """What would be executed, stage by stage: those that would run side by side are placed side by side."""
    crosses = crossing(recipe.environment)
    held: list[tuple[Stage, Share]] = []
    for stage in todo:
        if any(other.name in stage.needs for other, _ in held):
            for _, taken in held:
                room.release(taken)
            held = []
        if (share := room.take(stage)) is None:
            for _, taken in held:
                room.release(taken)
            held = []
            share = room.take(stage)
        assert share is not None  # the shares have been checked
        held.append((stage, share))
        lines = [f"\n{stage.name} {room.where(share)}".rstrip() + ":"]
        for part, task in zip(share, backend.tasks(Job(run, recipe, stage, share)), strict=True):
            own = {name: value for name, value in task.environment.items() if name not in crosses}
            words = [f"{name}={value}" for name, value in own.items()] + task.command
            lines.append(f"  {part.host}: {shlex.join(words)}")
            if task.lease is not None:
                lines.append(f"    by {shlex.join(module_on(part.host, 'launcher.guard'))}")
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    if backend.name == "hosts" and crosses:
        # Names alone: there are secrets among the values.
        console.print(f"\nFrom here to every host: {', '.join(crosses)}", highlight=False, soft_wrap=True)
