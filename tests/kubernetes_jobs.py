"""Jobs of a run for a Kubernetes cluster, and its section of the recipe."""

from __future__ import annotations

from pathlib import Path

from launcher.backends import Job
from launcher.kubernetes_config import KubernetesConfig
from launcher.placement import Part
from launcher.recipe import load_recipe
from launcher.stages import STAGES

RUN = Path("/shared/runs/first")
NEEDED = {"namespace": "team", "image": "registry.example/stretto:0.1.0", "volumes": {"shared": "/shared"}}
"""What has no default that would work."""
WHOLE = {
    **NEEDED,
    "pull_secrets": ["registry"],
    "volumes": {"shared": "/shared", "music": "/music"},
    "service_account": "trainer",
    "workflow_account": "workflows",
    "nodes": 2,
    "gpus_per_node": 4,
    "resources": {"rdma/hca": 1},
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
    "queue": "team-queue",
    "priority_class": "training",
    "user": 1000,
    "group": 1000,
    "env": {"HF_HOME": "/shared/hub", "NCCL_SOCKET_IFNAME": "eth0"},
    "secrets": ["hub-token"],
}
"""Every key of the section that does something."""


def config(**keys) -> KubernetesConfig:
    return KubernetesConfig(**{**NEEDED, **keys})


def share(nodes: int, ranks: int) -> tuple[Part, ...]:
    return tuple(Part(f"node-{number}", tuple(range(ranks)), ranks) for number in range(nodes))


def jobs(run: Path = RUN, recipe: str = "quickstart", *overrides: str) -> list[Job]:
    """Every stage of a run: training and tokenising on two nodes of four, all else on one GPU."""
    loaded = load_recipe(recipe, overrides)
    return [Job(run, loaded, stage, share(2, 4) if stage.ranked else share(1, 1)) for stage in STAGES]
