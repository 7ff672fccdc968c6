"""What the cluster is given: a JobSet for each stage, and the Argo Workflow that makes them when they are ready.

JobSet's own `dependsOn` does not do: it ties jobs of one JobSet together, in which the failure of one ends the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.lock import PATIENCE
from launcher.backends import Job
from launcher.kubernetes_config import KubernetesConfig
from launcher.processes import LOCK_SECONDS
from model.errors import UserError
from trainer.exit_codes import DIVERGED, SAVED

PORT = 29500
"""Where ranks meet: every pod has an address of its own."""
SLUG_LENGTH = 20
"""Of a recipe's name in names of the cluster: the longest of them, a pod's, has 61 of the 63 letters it may have."""
NODE = "node"
CONTAINER = "stage"
USER_MISTAKE = 2
DAY_SECONDS = 86_400
PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z/][\w./:-]*", re.IGNORECASE | re.ASCII)
"""Text that no reader of YAML, of whichever version, takes for something else."""

Manifest = dict[str, Any]


def workflow_name(recipe: str, run: Path, number: int) -> str:
    """What the submission `number` of a run is called: lower case letters, digits and hyphens, a letter first. Runs of
    one recipe in several folders differ by a few letters that follow from the folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}"
    folder = hashlib.sha256(str(run).encode()).hexdigest()[:6]
    return f"{slug[:SLUG_LENGTH].strip('-')}-{folder}-{number}"


def jobset_name(workflow: str, stage: str) -> str:
    return f"{workflow}-{stage}"


def workflow_of(jobset: str) -> str:
    return jobset.rpartition("-")[0]


def stage_of(jobset: str) -> str:
    return jobset.rpartition("-")[2]


def workflow(jobs: Sequence[Job], name: str, config: KubernetesConfig) -> Manifest:
    """Makes each job's JobSet when those its stage needs have completed, and waits for its end. Where one has failed,
    what needs it is left out and all else goes on."""
    names = {job.stage.name for job in jobs}
    tasks = []
    for job in jobs:
        needs = [need for need in job.stage.needs if need in names]
        task = {"name": job.stage.name, "template": job.stage.name}
        tasks.append({**task, "dependencies": needs} if needs else task)
    templates = [_resource(jobset(job, jobset_name(name, job.stage.name), config), job.stage.name) for job in jobs]
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"name": name, "namespace": config.namespace, **_about(name, jobs[0])},
        "spec": {
            "entrypoint": "stages",
            **_given(serviceAccountName=config.workflow_account),
            "ttlStrategy": {"secondsAfterCompletion": config.keep_days * DAY_SECONDS},
            "templates": [{"name": "stages", "dag": {"failFast": False, "tasks": tasks}}, *templates],
        },
    }


def _resource(manifest: Manifest, stage: str) -> Manifest:
    text = dump(manifest)
    if "{{" in text:
        raise UserError("the run folder and the recipe's kubernetes section may not hold {{: Argo would replace it.")
    return {
        "name": stage,
        # What waits may be evicted. `apply` then finds the JobSet that is there, where `create` would fail.
        "retryStrategy": {"limit": "5", "retryPolicy": "OnError"},
        "resource": {
            "action": "apply",
            "setOwnerReference": True,
            "successCondition": "status.terminalState == Completed",
            "failureCondition": "status.terminalState == Failed",
            "manifest": text,
        },
    }


def jobset(job: Job, name: str, config: KubernetesConfig) -> Manifest:
    """One stage: an indexed Job with a pod for each node. Its pods start together and are started again together."""
    about = _about(workflow_of(name), job, job.stage.name)
    queue = {"kueue.x-k8s.io/queue-name": config.queue} if config.queue else {}
    nodes = len(job.share)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": config.namespace,
            "labels": about["labels"] | queue,
            "annotations": about["annotations"],
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": config.restarts,
                "rules": [{"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "ttlSecondsAfterFinished": config.keep_days * DAY_SECONDS,
            "replicatedJobs": [
                {
                    "name": NODE,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": nodes,
                            "parallelism": nodes,
                            # Without one of them the others cannot go on: the JobSet starts all of them again.
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": _pod_failures()},
                            "template": {
                                "metadata": {"labels": about["labels"]},
                                "spec": _pod(job, name, config),
                            },
                        }
                    },
                }
            ],
        },
    }


def _pod_failures() -> list[Manifest]:
    """What nobody can mend by running again ends the stage; what was told to stop, and has saved, is started again
    without counting, as is what the cluster took a node from. All else counts."""

    def codes(action: str, values: list[int]) -> Manifest:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}

    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [codes("FailJob", sorted((USER_MISTAKE, DIVERGED))), codes("Ignore", [SAVED]), disrupted]


def _pod(job: Job, name: str, config: KubernetesConfig) -> Manifest:
    security = _given(runAsUser=config.user, runAsGroup=config.group)
    volumes: list[Manifest] = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(config.volumes)
    ]
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shm}})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **_given(
            serviceAccountName=config.service_account,
            priorityClassName=config.priority_class,
            imagePullSecrets=[{"name": secret} for secret in config.pull_secrets],
            nodeSelector=config.node_selector,
            tolerations=[toleration.model_dump(exclude_none=True) for toleration in config.tolerations],
            securityContext=security,
        ),
        "containers": [_container(job, name, config)],
        "volumes": volumes,
    }


def _container(job: Job, name: str, config: KubernetesConfig) -> Manifest:
    nodes, each = len(job.share), len(job.share[0].slots)
    command = ["python", "-m", "launcher.pod", "--run", str(job.run), "--stage", job.stage.name, "--job", name]
    command += ["--nodes", str(nodes), "--ranks-per-node", str(each)]
    mounts = [{"name": f"volume-{number}", "mountPath": path} for number, path in enumerate(config.volumes.values())]
    return {
        "name": CONTAINER,
        "image": config.image,
        # Not `command`, which would take the place of the image's init.
        "args": [_literally(part) for part in command],
        "workingDir": str(job.run),
        "env": [{"name": key, "value": _literally(value)} for key, value in _environment(name, nodes, config).items()],
        **_given(envFrom=[{"secretRef": {"name": secret}} for secret in config.secrets]),
        "resources": _resources(each, config),
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _environment(name: str, nodes: int, config: KubernetesConfig) -> dict[str, str]:
    """Variables of a stage. The user's own win, but for where ranks meet."""
    master = "127.0.0.1" if nodes == 1 else f"{name}-{NODE}-0-0.{name}"
    # With a user id of the cluster's there may be no home and no name, which caches ask for.
    own = {"HOME": "/tmp", "USER": "stretto", "OMP_NUM_THREADS": str(config.cpus)}
    # What it takes the place of may still be saving.
    ranks = {"MASTER_ADDR": master, "MASTER_PORT": str(PORT), PATIENCE: str(config.grace_seconds + LOCK_SECONDS)}
    return {**own, **config.env, **ranks}


def _resources(ranks: int, config: KubernetesConfig) -> Manifest:
    number, unit = config.memory[:-2], config.memory[-2:]
    memory = f"{ranks * int(number)}{unit}"
    extended = {key: str(count) for key, count in config.resources.items()}
    if config.gpu_resource:
        extended[config.gpu_resource] = str(ranks)
    return {
        "requests": {"cpu": str(ranks * config.cpus), "memory": memory, **extended},
        "limits": {"memory": memory, **extended},
    }


def _about(workflow: str, job: Job, stage: str | None = None) -> Manifest:
    """Labels by which people find what belongs to a run, and where its folder is."""
    labels = {
        "app.kubernetes.io/name": "stretto",
        "app.kubernetes.io/managed-by": "stretto",
        "app.kubernetes.io/instance": workflow,
        **_given(**{"app.kubernetes.io/component": stage}),
    }
    return {"labels": labels, "annotations": {"stretto/run": str(job.run)}}


def _given(**values: Any) -> Manifest:
    """Those that are not empty."""
    return {key: value for key, value in values.items() if value is not None and value not in ([], {})}


def _literally(text: str) -> str:
    """`$(NAME)` would be replaced by a variable's value."""
    return text.replace("$(", "$$(")


class _Dumper(yaml.SafeDumper):
    """YAML that reads the same everywhere: text that could be a number, a truth or a time is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(*manifests: Manifest) -> str:
    # Long lines stay whole: a folded one is hard to compare.
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
