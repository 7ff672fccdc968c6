"""Slurm: one job a stage, all submitted at once. The cluster starts each when those it needs have ended well."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.backends import Job
from launcher.backends.slurm_check import problems
from launcher.backends.slurm_commands import ask, states
from launcher.hosts import Host
from launcher.job_record import JOBS, read_job
from launcher.placement import Places, Share, count, shares
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.run_folder import read_state
from launcher.slurm_config import SlurmConfig, minutes
from launcher.stage import Stage
from model.config import STAGES as TRAINED
from model.errors import UserError
from trainer.exit_codes import SAVED

OVER = {
    "COMPLETED": 0, "FAILED": 1, "BOOT_FAIL": 1, "NODE_FAIL": 1, "OUT_OF_MEMORY": 1, "REVOKED": 1,
    "CANCELLED": SAVED, "DEADLINE": SAVED, "PREEMPTED": SAVED, "TIMEOUT": SAVED,
}  # fmt: skip
"""States of jobs that have ended, and what that means where nothing of ours has said how."""


class Slurm:
    """Jobs of the cluster whose login node this is. A handle is the number of a job."""

    name = "slurm"

    def __init__(self, run: Path, config: SlurmConfig) -> None:
        self._run = run
        self._config = config

    def shares(self, recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Share]:
        """How many ranks each stage has, on how many nodes; which nodes Slurm says. Raises UserError for what is more
        than `slurm.nodes` have."""
        config = self._config
        largest = max(getattr(recipe.stages, name).train.ranks for name in TRAINED)
        slots = config.gpus_per_node or config.tasks_per_node or -(-largest // config.nodes)
        hosts = [Host(f"node-{number}", slots) for number in range(1, config.nodes + 1)]
        found = {}
        for name, ranks in shares(recipe, hosts, stages).items():
            share = Places(hosts).take([ranks])  # each job has an allocation of its own
            assert share is not None  # `shares` has looked
            found[name] = share
        return found

    def check(self, recipe: Recipe, stages: Sequence[Stage]) -> None:
        """Raises UserError with all that Slurm would refuse, before anything is submitted."""
        taken = self.shares(recipe, stages)
        wrong = problems(self._config, taken)
        if not wrong:
            # What only the cluster knows: limits of an account or a user, rules of the site.
            for stage in stages:
                try:
                    ask("sbatch", "--test-only", text=self.script(Job(self._run, recipe, stage, taken[stage.name])))
                except UserError as error:
                    wrong.append(str(error))
        if wrong:
            raise UserError("\n".join(dict.fromkeys(wrong)))

    def script(self, job: Job) -> str:
        """What sbatch is given. It is the user's to read and to submit by hand."""
        command = [sys.executable, "-m", "launcher.slurm_job", "--run", str(job.run), "--stage", job.stage.name]
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self._options(job)), ""]
        if self._config.setup:
            lines += [*self._config.setup, ""]
        return "\n".join([*lines, f"exec {shlex.join(command)}", ""])

    def _options(self, job: Job) -> list[str]:
        config, ranks = self._config, count(job.share)
        each = len(job.share[0].slots)
        named = {
            "job-name": f"{job.recipe.name}-{job.stage.name}",
            "chdir": str(job.run),
            # A percent sign would begin a pattern.
            "output": str(job_log(job.run, job.stage.name)).replace("%", "%%"),
            "open-mode": "append",
            "export": "ALL",
            "dependency": "afterok:" + ":".join(job.after) if job.after else None,
            "kill-on-invalid-dep": "yes",
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "time": minutes(config.time) if config.time else None,
            "signal": f"B:USR1@{config.signal_seconds}" if config.signal_seconds else None,
            "nodes": len(job.share),
            "ntasks": ranks,
            "ntasks-per-node": each,
            "gpus-per-node": min(each, config.gpus_per_node) or None,
            "cpus-per-task": config.cpus_per_task,
            "mem": config.mem,
        }
        written = [f"--{name}={shlex.quote(str(value))}" for name, value in named.items() if value is not None]
        return [*written, "--requeue", *config.options]

    def submit(self, job: Job) -> str:
        path = job.run / JOBS / f"{job.stage.name}.sbatch"
        path.parent.mkdir(exist_ok=True)
        job_log(job.run, job.stage.name).parent.mkdir(exist_ok=True)
        path.write_text(self.script(job), encoding="utf-8")
        return ask("sbatch", "--parsable", str(path)).strip().partition(";")[0]

    def poll(self, handle: str) -> Ended | None:
        state = states([handle]).get(handle, "gone")
        if state not in (*OVER, "gone"):
            return None
        said = self._said(handle)
        return Ended(said.get("code", OVER.get(state, SAVED)))

    def cancel(self, handle: str, now: bool = False) -> None:
        """A job that runs is told by its batch step, which gives ranks the time they need; scancel would give them that
        of the cluster's KillWait, often 30 s."""
        if states([handle]).get(handle) == "RUNNING" and not now:
            ask("scancel", "--batch", "--signal=TERM", handle)
        else:
            ask("scancel", handle)

    def logs(self, handle: str) -> Path:
        stages = read_state(self._run)["stages"]
        return job_log(self._run, next(name for name, entry in stages.items() if entry.get("job") == handle))

    def _said(self, handle: str) -> Mapping[str, int]:
        found = (read_job(self._run, name) for name in read_state(self._run)["stages"])
        return next((said for said in found if said and said["job"] == handle), {})


def job_log(run: Path, stage: str) -> Path:
    return run / "logs" / f"{stage}.log"
