"""`python -m launcher.pod --run RUN --stage STAGE …`: one pod of a stage's job, on one node of a Kubernetes cluster.

Its number among the nodes is JOB_COMPLETION_INDEX, which an indexed Job sets, and the ranks of all nodes meet at
MASTER_ADDR. It starts the ranks of its node, and its exit code is theirs: the Job's policy goes by it. The first node
writes RUN/jobs/STAGE.json.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.processes import plain_errors
from launcher.attempts import Attempts
from launcher.graph import Origin, stage_named
from launcher.guard import environment
from launcher.job_record import record_job
from launcher.node_ranks import rank_environments, run_ranks
from launcher.outcome import not_made, why
from launcher.placement import Part, in_words
from launcher.run_folder import read_state
from launcher.stage import Stage
from model.errors import UserError
from trainer.exit_codes import FAULT, SAVED

NAME_SECONDS = 600.0
"""How long the name of the first pod may take to appear in the cluster's DNS."""


@dataclass(frozen=True)
class Pod:
    """One pod among those of a stage's job."""

    run: Path
    stage: Stage
    origin: Origin
    job: str
    """The handle by which the launcher knows the job."""
    node: int
    nodes: int
    ranks: int
    """On each node."""

    @property
    def leads(self) -> bool:
        return self.node == 0

    @property
    def log(self) -> Path:
        name = self.stage.name if self.leads else f"{self.stage.name}-node-{self.node}"
        return self.run / "logs" / f"{name}.log"

    def say(self, **entry: Any) -> None:
        """Records something of the job, for all its pods."""
        if self.leads:
            record_job(self.run, self.stage.name, self.job, **entry)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.pod", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, seen by all pods")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--job", required=True, help="name of the job in the cluster")
    parser.add_argument("--nodes", type=int, default=1, help="pods of the job")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    arguments = parser.parse_args()
    with plain_errors(arguments.run):
        stage = stage_named(arguments.stage)
        made_from = read_state(arguments.run)["stages"].get(stage.name, {}).get("made_from")
        if made_from is None:
            raise UserError(f"nothing asked for stage {stage.name!r} in {arguments.run}: `stretto run` does.")
        node = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
        origin = Origin(**made_from)
        return make(Pod(arguments.run, stage, origin, arguments.job, node, arguments.nodes, arguments.ranks_per_node))


def make(pod: Pod) -> int:
    """Makes the artifact together with the other pods, unless it is there, and returns the exit code."""
    if not_made(pod.run, pod.stage, pod.origin) is None:
        print(f"{pod.stage.name} is made already.", flush=True)
        pod.say(state="done", error=None)
        return 0
    hosts = in_words(tuple(Part(f"node-{node}", tuple(range(pod.ranks)), pod.ranks) for node in range(pod.nodes)))
    attempts = Attempts(pod.run, pod.stage.name, pod.job)
    if pod.leads:
        attempts.begin(hosts)
    code, output = attempt(pod)
    if pod.leads:
        attempts.end(code)
    return conclude(pod, code, output)


def attempt(pod: Pod) -> tuple[int, str]:
    """The code of the ranks of this node, and what they have printed."""
    master, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    await_name(master)
    base = environment({"environment": {"PYTHONUNBUFFERED": "1"}, "sharers": pod.ranks})
    environments = rank_environments(base, pod.node, pod.nodes, pod.ranks, master, port)
    module = "trainer" if pod.stage.trained else "launcher.worker"
    command = [sys.executable, "-m", module, "--run", str(pod.run), "--stage", pod.stage.name]
    pod.log.parent.mkdir(exist_ok=True)
    with pod.log.open("ab") as log:
        stamp, first = time.strftime("%Y-%m-%d %H:%M:%S"), log.tell()
        where = f"{socket.gethostname()}, node {pod.node} of {pod.nodes}, {pod.ranks} ranks"
        log.write(f"{stamp} {where}: {' '.join(command)}\n".encode())
        log.flush()
        code = run_ranks(command, environments, pod.run, log)
    with pod.log.open("rb") as log:
        log.seek(first)
        return code, log.read().decode(errors="replace")


def await_name(name: str) -> None:
    """Waits until the name of the first pod can be resolved: pods start in any order, and DNS takes a while."""
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except socket.gaierror:
            if time.monotonic() > deadline:
                raise UserError(f"the cluster's DNS does not know {name}, where the ranks are to meet.") from None
            time.sleep(1)


def conclude(pod: Pod, code: int, output: str) -> int:
    """Notes how the ranks have ended, and returns the code of the pod."""
    if code == 0:
        wrong = not_made(pod.run, pod.stage, pod.origin) if pod.leads else None
        pod.say(state="failed" if wrong else "done", error=wrong)
        return FAULT if wrong else 0
    if code == SAVED:
        pod.say(state="interrupted", error=None)
        return code
    message, _ = why(pod.stage, pod.run, output, code)
    print(f"{pod.stage.name} failed: {message}", file=sys.stderr, flush=True)
    pod.say(state="failed", error=message)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
