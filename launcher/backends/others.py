"""Which backend a run's jobs are with: only one at a time may work in a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.backends import BatchBackend
from launcher.recipe import Recipe
from launcher.run_folder import DIRECT, ENDED, RunFolder, may_run
from model.errors import UserError


def batch_backend(name: str, run: Path, recipe: Recipe) -> BatchBackend:
    """The backend that `state.json` names, where it is not DIRECT."""
    if name == "slurm":
        from launcher.backends.slurm import Slurm

        return Slurm(run, recipe.slurm)
    from launcher.backends.kubernetes import Kubernetes

    return Kubernetes(run, recipe.kubernetes)


def job_of(stage: str, entry: Mapping[str, Any], run: Path, recipe: Recipe) -> str | None:
    """The job of a stage that was submitted to a cluster, also one whose number could not be noted: what submitted it
    was killed, or got no answer."""
    return entry.get("job") or batch_backend(entry["backend"], run, recipe).listed().get(stage)


def over(entry: Mapping[str, Any]) -> bool:
    """Whether nothing of a stage runs or waits to run, by its own word alone. Kubernetes starts pods again that have
    said that they failed or were interrupted: where it can be asked, it must be."""
    again = entry.get("backend") == "kubernetes" and entry["state"] != "done" and shutil.which("kubectl") is not None
    return entry["state"] in ENDED and not again


def check_others(folder: RunFolder, recipe: Recipe, name: str) -> None:
    """Forgets the jobs of another backend than `name` that have ended without a word: what is said of them must not
    stand in the way of what comes.

    Raises UserError where one still lives, or that cannot be told.
    """
    problems = []
    for stage, entry in folder.state["stages"].items():
        other, handle = entry.get("backend") or DIRECT, entry.get("job")
        if other not in (name, DIRECT) and not over(entry):
            handle = job_of(stage, entry, folder.path, recipe)
        if other == name or handle is None:
            continue
        if over(entry):
            folder.record(stage, job=None)
            continue
        if other == DIRECT:
            lives = may_run(folder.path, stage, entry)
        else:
            lives = batch_backend(other, folder.path, recipe).poll(handle) is None
        if lives:
            what = "as it was started from here" if other == DIRECT else f"as job {handle} of {other}"
            problems.append(f"{stage} still runs or waits, {what}: `stretto stop {folder.path}` ends it.")
        else:
            folder.record(stage, state=entry["state"] if entry["state"] in ENDED else "interrupted", job=None)
    if problems:
        raise UserError("\n".join(problems))


def unsaid(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What nobody has said of Slurm jobs that the entries of `state.json` hold to wait or run, and is to be changed in
    these: a job that was cancelled before it began, or died with its node, is over, or is back in the queue. Nothing
    where Slurm cannot be asked from here."""
    from launcher.backends.slurm import OVER
    from launcher.backends.slurm_commands import states

    handles = {
        name: entry["job"]
        for name, entry in stages.items()
        if entry.get("backend") == "slurm" and entry.get("job") and entry["state"] not in ENDED
    }
    if not handles or shutil.which("squeue") is None:
        return {}
    try:
        known = states(list(handles.values()))
    except UserError:
        return {}
    now = {name: known.get(handle, "COMPLETED") for name, handle in handles.items()}
    ended = {name: {"state": "interrupted", "job": None} for name, state in now.items() if state in OVER}
    return ended | {name: {"state": "waiting"} for name, state in now.items() if state == "PENDING"}
