"""Starting the process of a stage: its command, its environment, its port and its GPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.recipe import Recipe
from launcher.stage import Stage
from model.errors import UserError
from trainer.config import TrainConfig

ANOTHER_JOBS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a process believe it is part of a job it is not in."""


@dataclass(frozen=True)
class Machine:
    """What of this machine one of `parallel` stages may use."""

    cores: int
    gpus: tuple[str, ...]
    """Numbers of its GPUs."""

    @classmethod
    def here(cls) -> Machine:
        return cls(len(os.sched_getaffinity(0)), gpus())

    def share(self, slot: int, parallel: int) -> Machine:
        """What is left for one stage when `parallel` run at once. With fewer GPUs than stages, they share them."""
        own = self.gpus[slot::parallel] or self.gpus[slot % len(self.gpus) :][:1] if self.gpus else ()
        return Machine(max(1, self.cores // parallel), own)


def gpus() -> tuple[str, ...]:
    """The numbers of the GPUs this process may use, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    if visible is None or not devices:
        # A container may have devices 4 to 7 of its host; its programs count them from 0.
        return tuple(str(index) for index in range(len(devices)))
    chosen = tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    if not all(part.isdigit() for part in chosen):
        raise UserError(f"CUDA_VISIBLE_DEVICES is {visible!r}: name the GPUs by number, such as 0,1.")
    return chosen


def ranks(config: TrainConfig, available_gpus: int) -> int:
    """As many processes as the recipe says; with fewer GPUs, the most that still divide the global batch."""
    if not available_gpus or available_gpus >= config.ranks:
        return config.ranks
    micro = config.micro_batch if isinstance(config.micro_batch, int) else 1
    return next(count for count in range(available_gpus, 0, -1) if config.global_batch % (micro * count) == 0)


def stage_command(stage: Stage, run: Path, recipe: Recipe, machine: Machine) -> tuple[list[str], int]:
    """The command that makes a stage's artifact, and how many processes share the cores under it."""
    target = ["--run", str(run), "--stage", stage.name]
    if stage.trained:
        module, count = "trainer", ranks(getattr(recipe.stages, stage.name).train, len(machine.gpus))
    else:
        module, wanted = "launcher.worker", stage.ranks(recipe) if stage.ranks else 1
        count = min(wanted, len(machine.gpus) or wanted)
        if count == 1:
            return [sys.executable, "-m", module, *target], 1
    where = f"--include=localhost:{','.join(machine.gpus[:count])}" if machine.gpus else f"--num_gpus={count}"
    options = [f"--master_port={free_port()}", where, "--no_local_rank"]
    # Without a host file of its own, deepspeed would follow one that lies at its standard place.
    return [deepspeed_command(), "--hostfile=", *options, "--module", module, *target], count


def deepspeed_command() -> str:
    """The deepspeed launcher that belongs to this Python."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the deepspeed command is not installed beside this Python: install Stretto again with pip.")
    return found


def free_port() -> int:
    """A port that is free now. Another process may take it before it is used: the runner then tries once more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(machine: Machine, count: int) -> dict[str, str]:
    """For `count` processes that share `machine`."""
    env = {name: value for name, value in os.environ.items() if name not in ANOTHER_JOBS}
    env["PYTHONUNBUFFERED"] = "1"
    # deepspeed looks for ninja, which lies beside this Python.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores // count)))
    if machine.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(machine.gpus)
    else:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def start(command: list[str], env: dict[str, str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts `command` in a process group of its own, under a guard that ends the group when this process ends.

    It runs in `folder`: wherever the user stands there may be a `data` or a `model` that hides ours. What it prints is
    appended to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.guard", *command],
            stdin=subprocess.PIPE,  # never written to: it closes with this process, and then the guard acts
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
            start_new_session=True,
        )
