"""Several ranks of one job without the launcher: started from a server that has torch and DeepSpeed imported, so that a
job of tiny models takes a second or two, and ended when it hangs."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers import free_port

PRELOADED = [
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "trainer.training",
    "trainer.evaluation",
]
"""What each rank would import for itself: Muon, which DeepSpeed looks at whatever the optimizer is, takes 1.5 s."""
POLL_SECONDS = 0.02


_started: list[BaseProcess] = []


@atexit.register
def _end_all() -> None:
    """After a test that has failed amid a job, whose ranks Python would otherwise wait for."""
    for process in _started:
        if process.is_alive():
            process.kill()


@dataclass
class Ranks:
    """A job that runs."""

    processes: list[BaseProcess]
    folder: Path

    def output(self) -> str:
        """What each rank has printed."""
        logs = sorted(self.folder.glob("rank-*.txt"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all that still run."""
        for index, process in enumerate(self.processes):
            if rank in (None, index) and process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes of all ranks (negative: killed by that signal). As soon as one rank fails the others get ten
        seconds, as under the launcher. The test fails when `timeout` seconds pass."""
        deadline, failed = time.monotonic() + timeout, None
        while self.alive():
            now = time.monotonic()
            if failed is None and any(process.exitcode for process in self.processes):
                failed = now
            if failed is not None and now > failed + 10:
                self.send(signal.SIGKILL)
            if now > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"the ranks hung for {timeout} s\n{self.output()}")
            time.sleep(POLL_SECONDS)
        return [process.exitcode or 0 for process in self.processes]


def start_ranks(function: Callable[..., Any], count: int, folder: Path, *arguments: Any, **env: str) -> Ranks:
    """Starts `function(*arguments)` on `count` ranks with the environment a launcher gives them, `env` added.

    The function must be at the top of a module. What it returns is the rank's exit code; what it prints goes to
    `folder`/rank-N.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    processes: list[BaseProcess] = []
    for rank in range(count):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(function, arguments, own, folder / f"rank-{rank}.txt"))
        process.start()
        processes.append(process)
    _started.extend(processes)
    return Ranks(processes, folder)


def run_ranks(
    function: Callable[..., Any], count: int, folder: Path, *arguments: Any, timeout: float = 120, **env: str
) -> None:
    """`start_ranks`, and all must end well."""
    ranks = start_ranks(function, count, folder, *arguments, **env)
    codes = ranks.wait(timeout)
    assert codes == [0] * count, f"exit codes {codes}\n{ranks.output()}"


def _rank(function: Callable[..., Any], arguments: Sequence[Any], env: dict[str, str], log: Path) -> None:
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    code: Any
    try:
        code = function(*arguments) or 0
    except SystemExit as left:
        code = left.code
    except BaseException:  # noqa: BLE001 (as Python itself would: print it, end with 1)
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # multiprocessing leaves them out; shards clear their shared memory there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
