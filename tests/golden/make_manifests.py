"""Writes what a cluster is given for three stages: `PYTHONPATH=.:tests python tests/golden/make_manifests.py`.

Run it after a change that is meant, and look at the difference.
"""

from __future__ import annotations

from pathlib import Path

from kubernetes_jobs import WHOLE, config, jobs

from launcher.backends.kubernetes import Kubernetes

GOLDEN = Path(__file__).with_name("kubernetes-workflow.yaml")


def manifest() -> str:
    given = [job for job in jobs() if job.stage.name in ("tokens", "coarse", "bundle")]
    return Kubernetes(given[0].run, config(**WHOLE)).dry_run(given)


if __name__ == "__main__":
    GOLDEN.write_text(manifest())
