"""Where stages run: one file a kind of cluster, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.placement import Share
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.stage import Stage


@dataclass(frozen=True)
class Job:
    """One attempt to make the artifact of a stage."""

    run: Path
    recipe: Recipe
    stage: Stage
    share: Share
    """The hosts and slots it takes."""
    attempt: int = 1
    after: tuple[str, ...] = ()
    """Handles of jobs that must have ended well before, where the cluster itself starts jobs when they are ready."""


class Backend(Protocol):
    """A kind of cluster. A handle is a short text that names a job to it, also in another process later."""

    name: str

    def submit(self, job: Job) -> str:
        """Starts a job, or lets the cluster start it when it can. Raises UserError where the cluster refuses it."""

    def poll(self, handle: str) -> Ended | None:
        """How a job has ended; None while it lives or waits."""

    def cancel(self, handle: str, now: bool = False) -> None:
        """Tells a job to save and end; with `now` it is ended at once."""

    def logs(self, handle: str) -> Path:
        """What the processes of a job print."""


class BatchBackend(Backend, Protocol):
    """A cluster with an engine of its own for jobs that depend on each other."""

    joins: bool
    """Whether new jobs can wait for those of an earlier submission."""

    def listed(self) -> dict[str, str]:
        """The jobs that the cluster itself says work in the run folder or wait to, by their stages; none where it
        cannot be asked from here. The number of one may not have been noted when it was submitted."""

    def shares(self, recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Share]:
        """What each stage will take."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises UserError with all that the cluster would refuse."""

    def submit_all(self, jobs: Sequence[Job], submitted: Callable[[str, str], None]) -> str | None:
        """Gives the cluster `jobs`, in the order of their stages; each waits for those of them that make what it needs,
        and for the jobs that live already and that it names. `submitted` hears of each stage and its handle: before
        the cluster is given it, where the handle is known by then. Returns what is left for the user to do, if
        anything."""

    def dry_run(self, jobs: Sequence[Job]) -> str:
        """What `submit_all` would give the cluster."""
