"""Kubernetes: the cluster's own engines start the stages, restart them and wait for them, so nothing of ours lives on.

kubectl does the talking. Where there is none, the manifests are left in the run folder for where there is one.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.backends import Job
from launcher.backends.kubernetes_manifests import (
    dump,
    jobset,
    jobset_name,
    stage_of,
    workflow,
    workflow_name,
    workflow_of,
)
from launcher.hosts import Host
from launcher.job_record import JOBS, read_job
from launcher.kubernetes_config import KubernetesConfig
from launcher.placement import Places, Share, shares
from launcher.recipe import Recipe
from launcher.restarts import Ended
from launcher.run_folder import STATE
from launcher.stage import Stage
from model.errors import UserError
from trainer.exit_codes import FAULT, SAVED

ENDED = ("Succeeded", "Failed", "Error", "Skipped", "Omitted")
"""Phases of a Workflow, or a node of it, that come to nothing more."""
ENGINES = {"jobsets.jobset.x-k8s.io": "JobSet", "workflows.argoproj.io": "Argo Workflows"}
QUEUES = "localqueues.kueue.x-k8s.io"
KUBECTL_SECONDS = 120
GENTLY = ("--ignore-not-found", "--wait=false")
CHATTER = re.compile(r"[IWEF]\d{4} |Warning: ")
"""How the lines begin that kubectl logs."""


class Kubernetes:
    """Jobs of the run folder `run`. A handle is the name of a JobSet."""

    name = "kubernetes"
    joins = False

    def __init__(self, run: Path, config: KubernetesConfig) -> None:
        self._run = run.absolute()
        self._config = config

    def listed(self) -> dict[str, str]:
        return {}  # the names of all are noted before the cluster is given them

    def shares(self, recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Share]:
        """How many ranks each stage has, on how many nodes; which nodes the cluster says. Raises UserError for what is
        more than `kubernetes.nodes` have."""
        hosts = [Host(f"node-{number}", self._config.gpus_per_node) for number in range(self._config.nodes)]
        found = {}
        for name, ranks in shares(recipe, hosts, stages).items():
            share = Places(hosts).take([ranks])  # each job has pods of its own
            assert share is not None  # `shares` has looked
            found[name] = share
        return found

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises UserError with all that is missing or wrong, as far as it can be known before a pod starts."""
        self._check_config()
        if not self.reachable:
            return
        problems = self._lacking() or self._unfinished(jobs[0].recipe)
        if not problems:
            name = self._next_name(jobs[0].recipe)
            sets = [jobset(job, jobset_name(name, job.stage.name), self._config) for job in jobs]
            text = dump(workflow(jobs, name, self._config), *sets)
            done = self._try("apply", "--dry-run=server", "-f", "-", text=text)
            problems = _errors(done) if done.returncode else []
        if problems:
            raise UserError("\n".join(problems))

    def dry_run(self, jobs: Sequence[Job]) -> str:
        """What the cluster is given of all jobs, and all that it is given."""
        self._check_config()
        return dump(workflow(jobs, self._next_name(jobs[0].recipe), self._config)) if jobs else ""

    def submit(self, job: Job) -> str:
        handles: list[str] = []
        self.submit_all([job], lambda _, handle: handles.append(handle))
        return handles[0]

    def submit_all(self, jobs: Sequence[Job], submitted: Callable[[str, str], None]) -> str | None:
        """Gives the cluster `jobs`, whose dependencies it looks after from then on.

        Where there is no kubectl, returns what the user is to do elsewhere. Raises UserError where the cluster refuses
        them; nothing runs then.
        """
        name = self._next_name(jobs[0].recipe)
        manifest = self._run / JOBS / f"{name}.yaml"
        text = dump(workflow(jobs, name, self._config))
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text, encoding="utf-8")
        for job in jobs:  # before the answer, which may be lost; `poll` says of one that was refused that it has ended
            submitted(job.stage.name, jobset_name(name, job.stage.name))
        if self.reachable:
            self._ask("apply", "-f", str(manifest))
            return None
        command = shlex.join([*self._kubectl(), "apply", "-f", str(manifest)])
        return f"There is no kubectl here. Where there is one, this gives the run to the cluster: {command}"

    @property
    def reachable(self) -> bool:
        """Whether there is a kubectl to ask the cluster with."""
        return shutil.which("kubectl") is not None

    def poll(self, handle: str) -> Ended | None:
        said = read_job(self._run, stage_of(handle)) or {}
        if said.get("job") == handle and said.get("state") == "done":
            return Ended(0)
        found = self._get("jobset", handle)
        if found is None:
            return self._not_begun(handle)
        ended = found.get("status", {}).get("terminalState")
        if not ended:
            return None
        return Ended(0 if ended == "Completed" else self._code(handle))

    def cancel(self, handle: str, now: bool = False) -> None:
        """Deletes the JobSet: its pods save and end. What depends on it is left out by the Workflow, as is, where the
        stage has not begun, all that has not: of a Workflow no single part can be called off."""
        if self._get("jobset", handle) is None:
            self._ask("delete", "workflow", workflow_of(handle), "--cascade=orphan", *GENTLY)
            return
        self._ask("delete", "jobset", handle, *GENTLY)
        if now:
            pods = f"jobset.sigs.k8s.io/jobset-name={handle}"
            self._ask("delete", "pods", "-l", pods, "--now", *GENTLY)

    def logs(self, handle: str) -> Path:
        return self._run / "logs" / f"{stage_of(handle)}.log"

    def _check_config(self) -> None:
        config = self._config
        problems = []
        if config.image is None:
            problems.append("kubernetes.image is not set: build one from containers/Dockerfile, and name it.")
        if not any(self._run.is_relative_to(folder) for folder in config.volumes.values()):
            problems.append(
                f"no volume of kubernetes.volumes holds {self._run}: name a claim that all nodes mount, such as "
                f"kubernetes.volumes={{shared: {self._run.parent}}}, or choose a folder in one with -o."
            )
        if problems:
            raise UserError("\n".join(problems))

    def _next_name(self, recipe: Recipe) -> str:
        """Of a submission: objects of earlier ones may still be there."""
        return workflow_name(recipe.name, self._run, self._submissions() + 1)

    def _submissions(self) -> int:
        """How many there were."""
        numbers = (path.stem.rpartition("-")[2] for path in (self._run / JOBS).glob("*-*.yaml"))
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def _lacking(self) -> list[str]:
        """What the recipe needs and the cluster does not have."""
        known = self._ask("api-resources", "-o", "name").split()
        engines = ENGINES | ({QUEUES: "Kueue (kubernetes.queue)"} if self._config.queue else {})
        problems = [
            f"the cluster has no {engine}: whoever runs it can install it (docs/kubernetes.md)."
            for resource, engine in engines.items()
            if resource not in known
        ]
        return problems + self._missing(known)

    def _unfinished(self, recipe: Recipe) -> list[str]:
        """What the last submission of this run still works on, or why that is not known: two must not make the same."""
        name = workflow_name(recipe.name, self._run, self._submissions())
        found = self._try("get", ",".join(ENGINES), "-l", f"app.kubernetes.io/instance={name}", "-o", "json")
        if found.returncode:
            return _errors(found)
        if not any(map(_lives, json.loads(found.stdout)["items"])):
            return []
        return [
            f"{name}, which an earlier command gave to the cluster, still runs: wait until it has ended, or "
            f"`stretto stop {self._run}` lets it save and end."
        ]

    def _missing(self, known: Sequence[str]) -> list[str]:
        """What the recipe names and the cluster does not have. What may not be looked at is taken to be there."""
        config = self._config
        wanted = [f"persistentvolumeclaim/{claim}" for claim in config.volumes]
        wanted += [f"secret/{secret}" for secret in (*config.pull_secrets, *config.secrets)]
        accounts = {account for account in (config.service_account, config.workflow_account) if account}
        wanted += [f"serviceaccount/{account}" for account in sorted(accounts)]
        if config.priority_class:
            wanted.append(f"priorityclass/{config.priority_class}")
        if config.queue and QUEUES in known:
            wanted.append(f"{QUEUES}/{config.queue}")
        return [line for line in _errors(self._try("get", *wanted, "-o", "name")) if "(Forbidden)" not in line]

    def _not_begun(self, handle: str) -> Ended | None:
        """Of a stage without a JobSet: it waits, or what it needs has failed, or the JobSet was deleted since."""
        found = self._get("workflow", workflow_of(handle))
        if found is None:
            return Ended(SAVED)
        status = found.get("status", {})
        nodes = [node for node in status.get("nodes", {}).values() if node.get("displayName") == stage_of(handle)]
        phases = [node.get("phase") for node in nodes] or [status.get("phase")]
        return Ended(SAVED) if phases[0] in ENDED else None

    def _code(self, handle: str) -> int:
        """The exit code of the pod that failed first."""
        found = self._get("pods", "-l", f"jobset.sigs.k8s.io/jobset-name={handle}") or {}
        ends = []
        for pod in found.get("items", []):
            for status in pod.get("status", {}).get("containerStatuses", []):
                ended = status.get("state", {}).get("terminated")
                if ended and ended["exitCode"]:
                    ends.append((ended["finishedAt"], ended["exitCode"]))
        return min(ends)[1] if ends else FAULT

    def _get(self, *what: str) -> dict[str, Any] | None:
        answer = self._ask("get", *what, "-o", "json", "--ignore-not-found")
        return json.loads(answer) if answer.strip() else None

    def _kubectl(self) -> tuple[str, ...]:
        context = ("--context", self._config.context) if self._config.context else ()
        return ("kubectl", *context, "--namespace", self._config.namespace)

    def _ask(self, *arguments: str) -> str:
        """What kubectl answers. Raises UserError where it cannot do what is asked."""
        done = self._try(*arguments)
        if done.returncode:
            raise UserError("\n".join(_errors(done)))
        return done.stdout

    def _try(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._kubectl(), *arguments],
                input=text,
                capture_output=True,
                text=True,
                timeout=KUBECTL_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise UserError(
                "kubectl is not installed here, by which the cluster is asked whether an earlier submission has ended: "
                f"give the command where there is one. Where its workflow has ended or is deleted, remove "
                f"{self._run / STATE}: what is finished is kept."
            ) from None
        except subprocess.TimeoutExpired:
            raise UserError(f"the cluster has not answered for {KUBECTL_SECONDS} s: try again.") from None


def _lives(found: Mapping[str, Any]) -> bool:
    """Whether a Workflow or a JobSet has not ended, and is not being deleted."""
    status = found.get("status", {})
    ended = status.get("phase") in ENDED or status.get("terminalState")
    return not ended and "deletionTimestamp" not in found["metadata"]


def _errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What kubectl says went wrong."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return list(dict.fromkeys(f"the cluster says: {line}" for line in lines if not CHATTER.match(line)))
