"""Slurm: one job a stage, all submitted at once. The cluster starts each when those it needs have ended well."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.backends import Job
from launcher.backends.slurm_check import problems
from launcher.backends.slurm_commands import ask, own_jobs, states
from launcher.hosts import Host
from launcher.job_record import JOBS, read_job
from launcher.placement import Places, Share, count, shares
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.run_folder import ENDED, read_state
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
    joins = True

    def __init__(self, run: Path, config: SlurmConfig) -> None:
        self._run = run
        self._config = config

    def listed(self) -> dict[str, str]:
        folder = self._run / JOBS
        if shutil.which("squeue") is None or not any(folder.glob("*.sbatch")):
            return {}
        found: dict[str, str] = {}
        for handle, state, script in own_jobs():
            path = Path(script)
            if path.suffix != ".sbatch" or path.parent.resolve() != folder.resolve() or state in OVER:
                continue
            said = read_job(self._run, path.stem) or {}
            # One that has said how it ended may take a moment longer to be gone.
            if said.get("job") != handle or said.get("state") not in ENDED:
                found.setdefault(path.stem, handle)
        return found

    def shares(self, recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Share]:
        """How many ranks each stage has, on how many nodes; which nodes Slurm says. Raises UserError for what is more
        than its `slurm.nodes` have."""
        largest = max(getattr(recipe.stages, name).train.ranks for name in TRAINED)
        alike: dict[tuple[int, int], list[Stage]] = {}
        for stage in stages:
            config = self._config.of(stage.name)
            slots = config.gpus_per_node or config.tasks_per_node or -(-largest // config.nodes)
            alike.setdefault((config.nodes, slots), []).append(stage)
        found: dict[str, Share] = {}
        wrong: list[str] = []
        for (nodes, slots), group in alike.items():
            hosts = [Host(f"node-{number}", slots) for number in range(1, nodes + 1)]
            try:
                ranks = shares(recipe, hosts, group)
            except UserError as error:
                wrong.append(str(error))
                continue
            # Each job has an allocation of its own, and `shares` has looked that there is room.
            found |= {name: share for name, count in ranks.items() if (share := Places(hosts).take([count]))}
        if wrong:
            raise UserError("\n".join(wrong))
        return {stage.name: found[stage.name] for stage in stages}

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises UserError with all that Slurm would refuse, before anything is submitted."""
        wrong = problems(self._config, {job.stage.name: job.share for job in jobs})
        if not wrong:
            # What only the cluster knows: limits of an account or a user, rules of the site.
            for job in jobs:
                try:
                    ask("sbatch", "--test-only", text=self.script(job))
                except UserError as error:
                    wrong.append(str(error))
        if wrong:
            raise UserError("\n".join(dict.fromkeys(wrong)))

    def submit_all(self, jobs: Sequence[Job], submitted: Callable[[str, str], None]) -> None:
        handles: dict[str, str] = {}
        for job in jobs:
            after = [handles[need] for need in job.stage.needs if need in handles]
            handles[job.stage.name] = self.submit(replace(job, after=(*job.after, *after)))
            submitted(job.stage.name, handles[job.stage.name])

    def dry_run(self, jobs: Sequence[Job]) -> str:
        """The scripts; the names of stages stand for the numbers that jobs will have."""
        names = {job.stage.name for job in jobs}
        texts = []
        for job in jobs:
            after = tuple(need for need in job.stage.needs if need in names)
            texts.append(f"{job.stage.name}:\n{self.script(replace(job, after=after))}")
        return "\n".join(texts)

    def script(self, job: Job) -> str:
        """What sbatch is given. It is the user's to read and to submit by hand."""
        command = [sys.executable, "-m", "launcher.slurm_job", "--run", str(job.run), "--stage", job.stage.name]
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self._options(job)), ""]
        if setup := self._config.of(job.stage.name).setup:
            lines += [*setup, ""]
        return "\n".join([*lines, f"exec {shlex.join(command)}", ""])

    def _options(self, job: Job) -> list[str]:
        config, ranks = self._config.of(job.stage.name), count(job.share)
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
        code = self._said(handle).get("code")
        return Ended(OVER.get(state, SAVED) if code is None else code)

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

    def _said(self, handle: str) -> Mapping[str, Any]:
        found = (read_job(self._run, name) for name in read_state(self._run)["stages"])
        return next((said for said in found if said and said["job"] == handle), {})


def job_log(run: Path, stage: str) -> Path:
    return run / "logs" / f"{stage}.log"
