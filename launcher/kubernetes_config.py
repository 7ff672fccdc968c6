"""The recipe's section `kubernetes`: where stages run on a cluster, and with what. docs/kubernetes.md explains it.

It stands beside the backends, not among them, since recipes are read by all of them. Imports nothing heavy.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from model.config import Config

SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY)$", re.IGNORECASE)
"""How the names of variables end whose values nobody else should read."""


def _pinned(image: str) -> str:
    name, at, _ = image.partition("@sha256:")
    tag = name.rpartition("/")[2].partition(":")[2]
    if re.search(r"\s", image) or not (at or tag) or (tag == "latest" and not at):
        raise ValueError(
            f"{image!r} must name an image with its tag, such as registry.example/stretto:0.1.0, or digest"
        )
    return image


def _below_root(path: str) -> str:
    if not PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or len(PurePosixPath(path).parts) < 2:
        raise ValueError(f"{path!r} must be an absolute path such as /shared")
    return str(PurePosixPath(path))


def _no_secrets(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if SECRET.search(name):
            raise ValueError(f"{name!r} must come from a Secret: put it into one, and its name into secrets")
    return values


def _like(pattern: str, what: str, longest: int = 253) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII) or len(text) > longest:
            raise ValueError(f"{text!r} must be {what}")
        return text

    return AfterValidator(check)


Name = Annotated[str, _like(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "the name of an object of the cluster, such as my-team")]
Variable = Annotated[str, _like(r"[A-Za-z_]\w*", "the name of an environment variable")]
Label = Annotated[str, _like(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?", "the value of a label, such as h100", 63)]
Key = Annotated[
    str, _like(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?", "a key such as nvidia.com/gpu")
]
"""Of a label, a taint or a resource."""
Amount = Annotated[str, _like(r"[1-9]\d*(Mi|Gi|Ti)", "an amount of memory such as 64Gi")]
Image = Annotated[str, AfterValidator(_pinned)]
Folder = Annotated[str, AfterValidator(_below_root)]


class TolerationConfig(Config):
    """A taint of nodes that pods may run on all the same."""

    key: Key | None = None
    """None with `operator` Exists is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    def model_post_init(self, _: Any) -> None:
        if (self.operator == "Equal") != (self.value is not None) or (self.value is not None and self.key is None):
            raise ValueError("operator Equal needs a key and a value, Exists has no value")


class KubernetesConfig(Config):
    """What `stretto run --kubernetes` asks the cluster for. `image` and `volumes` have no default that would work."""

    context: str | None = Field(None, min_length=1)
    """Context of kubectl; its current one when not given."""
    namespace: Name = "default"
    image: Image | None = None
    """Image of every stage, with a tag or a digest (containers/Dockerfile)."""
    pull_secrets: list[Name] = Field([])
    """Secrets with which the image is fetched."""
    volumes: dict[Name, Folder] = Field({})
    """Volume claims and where they are mounted. The run folder must lie in one that all nodes can write to, under the
    path it has here."""
    service_account: Name | None = None
    """Of the stages' pods, which need no rights and get no token."""
    workflow_account: Name | None = None
    """Of the Argo Workflow, which must be allowed to make JobSets."""
    nodes: PositiveInt = 1
    """How many a stage may take: what `placement` divides."""
    gpus_per_node: PositiveInt = 8
    """Or processes, where gpu_resource is null."""
    gpu_resource: Key | None = "nvidia.com/gpu"
    """What GPUs are called here; null asks for none."""
    cpus: PositiveInt = 8
    """For each GPU."""
    memory: Amount = "64Gi"
    """For each GPU."""
    shm: Amount = "16Gi"
    """Size of /dev/shm, which loaders and NCCL use; what lies there counts as memory."""
    resources: dict[Key, PositiveInt] = Field({})
    """What else each pod asks for, such as {rdma/hca: 1}."""
    node_selector: dict[Key, Label] = Field({})
    """Labels of the nodes to run on."""
    tolerations: list[TolerationConfig] = Field([])
    queue: Name | None = None
    """LocalQueue of Kueue that admits the stages."""
    priority_class: Name | None = None
    user: NonNegativeInt | None = None
    """User id that stages run as, where not the image's: the one that may write to the run folder."""
    group: NonNegativeInt | None = None
    """Group id, likewise."""
    env: Annotated[dict[Variable, str], AfterValidator(_no_secrets)] = Field({})
    """Environment variables. Nothing of this machine's environment crosses by itself."""
    secrets: list[Name] = Field([])
    """Secrets whose keys become environment variables."""
    restarts: NonNegativeInt = 10
    """How often a stage is started again in all, after a fault, a hang or a kill; being preempted does not count."""
    grace_seconds: PositiveInt = 300
    """How long a stage that is told to stop may take to save."""
    keep_days: PositiveInt = 7
    """When the cluster forgets what has finished; the run folder stays."""
