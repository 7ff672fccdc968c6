"""`srun … python -m launcher.slurm_rank MODULE ARGUMENT…`: one task of Slurm as one rank of a job, and runs MODULE.

Ranks learn who they are from the environment; this gives it to them in the names that torch and DeepSpeed know.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path

from launcher.backends.slurm_commands import hostnames, tasks_per_node
from launcher.processes import gpus

PORTS = range(10_000, 30_000)
"""Below those that systems give to outgoing connections."""


def main() -> None:
    os.environ.update(environment(os.environ))
    if not gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    keep_tracker()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def keep_tracker() -> None:
    """Starts Python's tracker of shared memory, deaf to SIGUSR1. Slurm sends that to all processes of a task, and a
    tracker that is started again in the middle of things knows of nothing and fills the log with errors."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)


def environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment must say, by what that of its task says."""
    node = int(slurm["SLURM_NODEID"])
    # Another for each attempt in one allocation, and each job on a shared node.
    port = PORTS[(int(slurm["SLURM_JOB_ID"]) * 31 + int(slurm["SLURM_STEP_ID"])) % len(PORTS)]
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": hostnames(slurm["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS", slurm.get("SLURM_CPUS_PER_TASK", "1")),
        # DeepSpeed looks for ninja, which lies beside this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), slurm.get("PATH", os.defpath)]),
    }


if __name__ == "__main__":
    main()
