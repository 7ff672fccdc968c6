"""The ranks of one node, started and watched by the process that stands for the node, such as a pod's first.

The deepspeed command would do so too, but it ends as soon as it is told to stop. Where its end is the end of the
container, the ranks would be killed before they have saved. This waits for them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from trainer.exit_codes import SAVED

POLL_SECONDS = 0.1
END_SECONDS = 60.0
"""How long the others may take to end once a rank has failed: as long as a rank takes at most that ends by itself."""
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def rank_environments(
    base: Mapping[str, str], node: int, nodes: int, ranks: int, master: str, port: str
) -> list[dict[str, str]]:
    """What each rank of a node learns who it is from."""
    return [
        {
            **base,
            "RANK": str(node * ranks + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(nodes * ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
        }
        for local in range(ranks)
    ]


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, log: IO[bytes]) -> int:
    """Runs `command` in `folder` once for each of `environments`, and returns the code of the first that failed, or 0.

    What they print goes to `log` and to this process's own output. Signals to stop are passed on to all, which save and
    end with SAVED, or just end, where they save as they go: that is SAVED too. When one rank fails the others are told
    to stop as well.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        _tell(ranks, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP}
    reading, writing = os.pipe()
    # Started here, in the main thread: ranks ask to be killed when the thread that started them ends.
    for environment in environments:
        ranks.append(
            subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
            )
        )
    os.close(writing)
    if told:  # before all of them were there
        _tell(ranks, signal.SIGTERM)
    copying = threading.Thread(target=_copy, args=(reading, log), daemon=True)
    copying.start()
    try:
        code = _wait(ranks)
        return SAVED if told and code == -signal.SIGTERM else code
    finally:
        # A process that a killed rank has left may hold the pipe open.
        copying.join(timeout=5)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    code, deadline = 0, float("inf")
    living = list(ranks)
    while living:
        time.sleep(POLL_SECONDS)
        for rank in list(living):
            ended = rank.poll()
            if ended is None:
                continue
            living.remove(rank)
            if ended and not code:
                code, deadline = ended, time.monotonic() + END_SECONDS
                _tell(living, signal.SIGTERM)
        if time.monotonic() > deadline:
            _tell(living, signal.SIGKILL)
    return code


def _tell(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _copy(reading: int, log: IO[bytes]) -> None:
    with os.fdopen(reading, "rb", buffering=0) as output:
        while text := output.read(65_536):
            log.write(text)
            log.flush()
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
