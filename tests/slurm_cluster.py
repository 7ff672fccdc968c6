"""A real Slurm for a test: munged, slurmctld and a slurmd for each of two nodes, alpha and beta, on this machine.

It lives in namespaces of its own (processes, mounts, host name, network), so nothing of it is seen outside and none of
it outlives the test, however that ends. tests/slurm_cluster.sh sets it up.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from helpers import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
NAMESPACES = ["--fork", "--pid", "--mount-proc", "--mount", "--uts", "--net", "--ipc"]
START_SECONDS = 20


def missing() -> str:
    """Why there can be no cluster here; nothing where there can."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: tests/setup_cluster.sh installs what Slurm needs"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@dataclass(frozen=True)
class SlurmCluster:
    """A cluster that runs. `run` is a shell on its login node."""

    folder: Path
    inside: int
    """The first process in its namespaces."""

    def start(self, *command: object, **settings) -> subprocess.Popen[str]:
        """Starts a command there, in a process group of its own."""
        enter = ["nsenter", f"--target={self.inside}", "--pid", "--mount", "--uts", "--net", "--ipc", f"--wd={ROOT}"]
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **settings.pop("env", {})}
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        arguments = [*enter, *map(str, command)]
        return subprocess.Popen(arguments, env=env, text=True, start_new_session=True, **settings)

    def run(self, *command: object, timeout: float = 60, code: int | None = 0, **settings):
        """What a command says that must end with `code`, in `timeout` seconds."""
        with self.start(*command, **settings) as process:
            try:
                out, error = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, error = process.communicate()
                raise AssertionError(f"{command} hung for {timeout} s\n{out}\n{error}\n{self.logs()}") from None
        assert code in (None, process.returncode), f"{command} ended with {process.returncode}\n{out}\n{error}"
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, out, error)

    def lose(self, node: str) -> None:
        """Kills all that runs on a node, at once."""
        everything = psutil.Process(self.inside).children(recursive=True)
        daemon = next(process for process in everything if process.cmdline() == ["slurmd", "-D", "-N", node])
        own_name = os.stat(f"/proc/{daemon.pid}/ns/uts").st_ino
        for process in everything:
            with contextlib.suppress(FileNotFoundError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/uts").st_ino == own_name:
                    process.kill()

    def bring_back(self, node: str) -> None:
        """Starts a node that was lost, as slurm_cluster.sh does."""
        script = f"hostname {node}; mount -t tmpfs tmpfs /dev/shm; exec slurmd -D -N {node}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.start("unshare", "--uts", "--mount", "sh", "-c", script, **quiet)

    def logs(self) -> str:
        """The last lines of what Slurm's own programs say."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in found)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Starts a cluster that keeps all it has in `folder`, and ends it completely."""
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    script = Path(__file__).with_suffix(".sh")
    # Its input closes however this process ends, and with its first process all the others in its namespace end.
    with (
        (folder / "setup.log").open("w") as log,
        subprocess.Popen(
            ["unshare", *NAMESPACES, "--kill-child", script, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PATH": path},
            start_new_session=True,
        ) as process,
    ):
        try:
            cluster = SlurmCluster(folder, _wait_until_ready(process, folder))
            yield cluster
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[str], folder: Path) -> int:
    assert process.stdout is not None
    words = select.poll()  # select.select takes no descriptor above 1023
    words.register(process.stdout, select.POLLIN)
    deadline = time.monotonic() + START_SECONDS
    while not words.poll(200):
        if process.poll() is not None or time.monotonic() > deadline:
            break
    else:
        if process.stdout.readline() == "ready\n":
            return psutil.Process(process.pid).children()[0].pid
    raise AssertionError(f"no cluster: {SlurmCluster(folder, 0).logs()}")
