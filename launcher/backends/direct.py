"""This machine, or the hosts of a hostfile reached by ssh: a supervisor for each job, which outlives the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.backends import Job
from launcher.hosts import Host, module_on
from launcher.job import LEASE
from launcher.job_record import JOBS, alive, handle_of, read_job, record_job, supervisor
from launcher.processes import Machine, Task, host_tasks, hostfile_text, local_tasks
from launcher.restarts import Ended

KILLED = -int(signal.SIGKILL)


class Direct:
    """Jobs that are started from here. Without `hosts` they run on this machine."""

    def __init__(self, run: Path, hosts: Sequence[Host] = (), addresses: Mapping[str, str] | None = None) -> None:
        self.name = "hosts" if hosts else "local"
        self._run = run
        self._hosts = list(hosts)
        self._addresses = dict(addresses or {})
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def tasks(self, job: Job) -> list[Task]:
        """What runs on each host of the job's share."""
        if not self._hosts:
            (part,) = job.share
            gpus = Machine.here().gpus
            own = tuple(str(slot) for slot in part.slots) if gpus else ()
            return local_tasks(job, Machine(part.of, own))
        hostfile = job.run / JOBS / f"{job.stage.name}.hosts"
        return host_tasks(job, self._hosts, self._addresses, hostfile, LEASE)

    def submit(self, job: Job, noted: Callable[[str], object] = lambda handle: None) -> str:
        """As every backend. The handle is `noted` before anything can run by it: should this process be killed in
        between, the supervisor ends as well."""
        tasks = self.tasks(job)
        if self._hosts:
            (job.run / JOBS).mkdir(exist_ok=True)
            (job.run / JOBS / f"{job.stage.name}.hosts").write_text(hostfile_text(job.share))
        nodes = [
            {"host": part.host, "start": module_on(part.host, "launcher.guard"), "task": task.to_json()}
            for part, task in zip(job.share, tasks, strict=True)
        ]
        log = job_log(job.run, job.stage.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            for part, task in zip(job.share, tasks, strict=True):
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                output.write(f"{stamp} {part.host}: {' '.join(task.command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "launcher.job", str(job.run)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=job.run,
                start_new_session=True,
            )
        handle = handle_of(job.stage.name, process.pid)
        self._started[handle] = process
        noted(handle)
        record_job(job.run, job.stage.name, handle)  # as long as this says no code, it may run
        specification = {"run": str(job.run), "stage": job.stage.name, "nodes": nodes}
        assert process.stdin is not None
        # By a pipe, not as an argument: the environment may hold secrets, and arguments can be seen by all.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(specification).encode() + b"\n")
            process.stdin.close()
        return handle

    def poll(self, handle: str) -> Ended | None:
        if handle in self._started:
            self._started[handle].poll()  # so that it does not stay a zombie
        if alive(handle):
            return None
        said = self._said(handle)
        if "code" not in said:
            return Ended(KILLED)
        return Ended(said["code"], tuple(said["lost"]))

    def cancel(self, handle: str, now: bool = False) -> None:
        cancel(handle, now)

    def logs(self, handle: str) -> Path:
        return job_log(self._run, handle.partition(":")[0])

    def _said(self, handle: str) -> dict[str, Any]:
        said = read_job(self._run, handle.partition(":")[0]) or {}
        return said if said.get("job") == handle else {}


def job_log(run: Path, stage: str) -> Path:
    return run / "logs" / f"{stage}.log"


def cancel(handle: str, now: bool = False) -> None:
    """Tells the supervisor of a job to let it save and end, or to end it; one that has ended is left in peace."""
    if alive(handle):
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor(handle).pid, signal.SIGQUIT if now else signal.SIGTERM)
