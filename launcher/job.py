"""`python -m launcher.job`: supervises one attempt of a stage on its hosts, a guard on each, from start to end.

It lives in a session of its own, so the death of the launcher does not touch it: a later one finds it. Its standard
input is one line, the specification as JSON (`launcher.backends.direct`). SIGTERM lets the stage save and end, SIGQUIT
ends it at once. How it ended is left in RUN/jobs/STAGE.json; the exit code is that of the rank that failed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.guard import END, PING, SAVE
from launcher.job_record import handle_of, record_job

POLL_SECONDS = 0.1
PING_SECONDS = 2.0
LEASE = 20.0
"""Seconds that processes on another host go on without a word from here."""
UNREACHABLE = 255
"""What ssh ends with when it cannot reach a host, or no longer."""
END_SECONDS = 40.0
"""How long the others may take to end once a host's ranks have failed; ranks see within seconds that one is gone."""


@dataclass
class Node:
    """The guard on one host, or the ssh that leads to it."""

    host: str
    remote: bool
    guard: subprocess.Popen[bytes]
    code: int | None = None
    told_to_end: bool = False

    @property
    def lost(self) -> bool:
        # A guard that is told to end kills itself with all others, which ssh tells by the same code.
        return self.remote and self.code == UNREACHABLE and not self.told_to_end

    def tell(self, what: bytes) -> None:
        assert self.guard.stdin is not None
        self.told_to_end = self.told_to_end or what == END
        with contextlib.suppress(BrokenPipeError):
            self.guard.stdin.write(what)
            self.guard.stdin.flush()


def main() -> int:
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda number, _: told.append(number))
    specification = json.loads(sys.stdin.readline())
    run, stage = Path(specification["run"]), specification["stage"]
    handle = handle_of(stage, os.getpid())
    nodes = [start(node) for node in specification["nodes"]]
    code = supervise(nodes, told)
    record_job(run, stage, handle, code=code, lost=[node.host for node in nodes if node.lost])
    return code if code >= 0 else 128 - code


def start(node: dict[str, Any]) -> Node:
    """Starts the guard of a host, in a process group of its own, and gives it its task."""
    guard = subprocess.Popen(node["start"], stdin=subprocess.PIPE, start_new_session=True)
    started = Node(node["host"], node["task"]["lease"] is not None, guard)
    started.tell(json.dumps(node["task"]).encode() + b"\n")
    return started


def supervise(nodes: list[Node], told: list[int]) -> int:
    """Waits for all `nodes` to end and returns the code of the first that failed, or 0; passes on what it is `told`."""
    code, passed, pinged = 0, 0, time.monotonic()
    deadline: float | None = None
    while any(node.code is None for node in nodes):
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - pinged > PING_SECONDS:
            pinged = now
            _tell(nodes, PING)
        for number in told[passed:]:
            passed += 1
            _tell(nodes, END if number == signal.SIGQUIT else SAVE)
        for node in nodes:
            if node.code is None and (ended := node.guard.poll()) is not None:
                node.code = ended
                code = code or ended
                if ended:
                    # Without a host the others cannot even save; any other failure they see for themselves.
                    deadline = now if node.lost else min(deadline or now + END_SECONDS, now + END_SECONDS)
        if deadline is not None and now >= deadline:
            _tell(nodes, END)
    if any(node.lost for node in nodes) and signal.SIGQUIT not in told:
        # What still runs on a host that is cut off ends by its lease; until then nothing may take its place.
        time.sleep(max(0.0, pinged + LEASE + PING_SECONDS - time.monotonic()))
    return code


def _tell(nodes: list[Node], what: bytes) -> None:
    for node in nodes:
        if node.code is None:
            node.tell(what)


if __name__ == "__main__":
    sys.exit(main())
