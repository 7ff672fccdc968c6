"""What a stage's job runs on each of its hosts: commands, ports, GPUs, environment."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.lock import PATIENCE
from launcher.hosts import LOCALHOST, Host, crossing, is_here
from launcher.placement import Part, Share, count
from model.errors import UserError
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from launcher.backends import Job

PORTS = range(20_000, 30_000)
"""Below those that the kernel gives out by itself."""
LOCK_SECONDS = 120
"""That a training which is started again waits for the lock of its stage."""


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


@dataclass(frozen=True)
class Task:
    """What the guard of one host is to run (launcher.guard)."""

    command: list[str]
    folder: str
    """Where it runs: wherever the user stands there may be a `data` or a `model` that hides ours."""
    environment: dict[str, str]
    """Laid over the host's own."""
    sharers: int
    """Processes that share the cores of the host."""
    lease: float | None = None
    """Seconds without a word after which it ends all; none on this machine, where a closed pipe says as much."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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


def local_tasks(job: Job, machine: Machine) -> list[Task]:
    """A job on this machine alone, whose GPUs, if it has any, are those of `machine`."""
    (part,) = job.share
    environment = {"PYTHONUNBUFFERED": "1"}
    if machine.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(machine.gpus)
    else:
        environment["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    if not job.stage.trained and count(job.share) == 1:
        command = alone(job)
    else:
        where = f"--include={LOCALHOST}:{_slots(part)}" if machine.gpus else f"--num_gpus={count(job.share)}"
        # Without a host file of its own, deepspeed would follow one that lies at its standard place.
        options = ["--hostfile=", f"--master_port={port_for(job)}", where]
        command = together(job, options)
    return [Task(command, str(job.run), environment | _attempt(job), part.of)]


def host_tasks(
    job: Job, hosts: Sequence[Host], addresses: Mapping[str, str], hostfile: Path, lease: float
) -> list[Task]:
    """A job on the hosts of its share, one task each. `addresses` are where other hosts reach them, by their names, and
    `hostfile` will hold those of the share."""
    environment = {"PYTHONUNBUFFERED": "1", **crossing(job.recipe.environment), **_attempt(job)}
    master = "127.0.0.1" if len(job.share) == 1 else addresses.get(job.share[0].host, job.share[0].host)
    include = "@".join(f"{part.host}:{_slots(part)}" for part in job.share)
    tasks = []
    for node, part in enumerate(job.share):
        own = dict(environment)
        if not job.stage.trained and count(job.share) == 1:
            command, own["CUDA_VISIBLE_DEVICES"] = alone(job), _slots(part)
        else:
            options = [f"--hostfile={hostfile}", f"--include={include}", "--no_ssh", f"--node_rank={node}"]
            options += [f"--master_addr={master}", f"--master_port={port_for(job)}"]
            command = together(job, options)
        tasks.append(Task(command, str(job.run), own, part.of, None if is_here(part.host) else lease))
    return tasks


def hostfile_text(share: Share) -> str:
    return "".join(f"{part.host} slots={part.of}\n" for part in share)


def alone(job: Job) -> list[str]:
    """A stage in one process."""
    return [sys.executable, "-m", "launcher.worker", *_target(job)]


def together(job: Job, options: Sequence[str]) -> list[str]:
    """A stage under the deepspeed launcher."""
    module = "trainer" if job.stage.trained else "launcher.worker"
    return [deepspeed_command(), *options, "--no_local_rank", "--module", module, *_target(job)]


def _target(job: Job) -> list[str]:
    return ["--run", str(job.run), "--stage", job.stage.name]


def _slots(part: Part) -> str:
    return ",".join(map(str, part.slots))


def _attempt(job: Job) -> dict[str, str]:
    return {PATIENCE: str(LOCK_SECONDS)} if job.attempt > 1 else {}


def deepspeed_command() -> str:
    """The deepspeed launcher that belongs to this Python."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the deepspeed command is not installed beside this Python: install Stretto again with pip.")
    return found


def port_for(job: Job) -> int:
    """A port for the ranks of this attempt to meet at: another for each stage, run and attempt, and free on this
    machine now. On another host it may be taken, and another process may take it before it is used: the job then ends,
    and the next attempt has another."""
    first = zlib.crc32(f"{job.run} {job.stage.name} {job.attempt}".encode()) % len(PORTS)
    for number in range(len(PORTS)):
        port = PORTS[(first + number) % len(PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"every port from {PORTS[0]} to {PORTS[-1]} is taken on this machine.")
