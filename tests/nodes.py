"""Real nodes on one machine: each with a network, processes, host name, shared memory, home and sshd of its own.

They are joined by a bridge, share the disk as a cluster shares a folder, and nothing in the machine's own network
changes: all of it lies in namespaces below one process, and goes with it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from helpers import ROOT

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = ("unshare", "nsenter", "mount", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
START_SECONDS = 30
OWN = ("--mount", "--uts", "--ipc", "--net", "--pid")
"""What a node does not share with the machine."""
FIRST_PROCESS = """
hostname "$1"
ip link set lo up
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
for file in hosts passwd shadow; do mount --bind "$2/etc/$file" "/etc/$file"; done
exec "$3" -D -f "$2/etc/sshd_config" -E "$2/sshd.log"
"""
"""Of a node, with its name, its folder and where sshd is. sshd stays, and takes care of orphans as an init does."""
SSHD = """
HostKey {folder}/etc/host_key
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""


@functools.cache
def skip_reason() -> str | None:
    """Why there can be no nodes here, or None."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=SYSTEM_PATH)]
    if missing:
        return f"{', '.join(missing)} not installed (tests/setup_cluster.sh)"
    if os.geteuid() != 0:
        return "nodes with an sshd each need root"
    command = ["unshare", *OWN, "--fork", "--kill-child", "--mount-proc", "ip", "link", "add", "type", "bridge"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    return f"no namespaces or bridges here: {tried.stderr.strip()}" if tried.returncode else None


class Process(subprocess.Popen):
    """A process in a node. Signals go to it, not to the `nsenter` whose child it is and which ends as it ends."""

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for inside in psutil.Process(self.pid).children():
                inside.send_signal(sig)

    def kill_all(self) -> None:
        """Kills it and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for inside in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    inside.kill()


@dataclass
class Node:
    """One of a cluster."""

    name: str
    number: int
    folder: Path
    """Its home, its part of /etc, and sshd's log."""
    init: int = 0
    """Its first process, by the machine's count: while that lives, so does the node."""

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def port(self) -> str:
        """Its port of the bridge."""
        return f"port{self.number}"

    def listens(self) -> bool:
        """Whether its sshd takes connections: 0016 is port 22, 0A is listening."""
        sockets = (line.split() for line in Path(f"/proc/{self.init}/net/tcp").read_text().splitlines())
        return any(columns[1].endswith(":0016") and columns[3] == "0A" for columns in sockets)


@dataclass
class Cluster:
    """Nodes that run."""

    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    switch: int = 0
    """A process in the network of the bridge."""
    _entered: list[subprocess.Popen] = field(default_factory=list)

    def popen(self, node: str, command: Sequence[str], env: Mapping[str, str] | None = None, **settings) -> Process:
        """Starts `command` on a node, in the project's folder and a session of its own, as from a shell there.

        It has this process's environment and `env`; `settings` are those of `subprocess.Popen`.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
        own = {"HOME": str(self.nodes[node].home), "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"}
        folder = settings.pop("cwd", ROOT)
        entered = enter(self.nodes[node].init, *OWN, f"--wdns={folder}")
        return Process(
            [*entered, *command], env={**inherited, **own, **(env or {})}, start_new_session=True, text=True, **settings
        )

    def run(
        self, node: str, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120, **settings
    ) -> subprocess.CompletedProcess[str]:
        """Runs `command` on a node to its end; when `timeout` (seconds) passes, it is killed with all it started there,
        and the test fails."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(node, command, env, **{**pipes, **settings}) as process:
            try:
                out, error = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill_all()
                out, error = process.communicate(timeout=START_SECONDS)
                raise AssertionError(f"{command} on {node} hung for {timeout} s\n{out}\n{error}") from None
        return subprocess.CompletedProcess(list(command), process.returncode, out, error)

    def cut(self, node: str) -> None:
        """Pulls the plug of a node's network."""
        self._ip("link", "set", self.nodes[node].port, "down")

    def restore(self, node: str) -> None:
        """Puts it in again."""
        self._ip("link", "set", self.nodes[node].port, "up")

    def hostfile(self, path: Path, slots: int | Mapping[str, int] = 1) -> Path:
        """Writes a hostfile of all nodes, or of those that `slots` names, and returns its path."""
        counts = slots if isinstance(slots, Mapping) else dict.fromkeys(self.nodes, slots)
        path.write_text("".join(f"{name} slots={count}\n" for name, count in counts.items()))
        return path

    def processes(self, node: str) -> dict[int, str]:
        """What runs on a node besides its sshd and the connections to it: process ids, as the machine counts them, and
        command lines."""
        found, place = {}, os.readlink(f"/proc/{self.nodes[node].init}/ns/pid")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.readlink(f"/proc/{process.pid}/ns/pid") == place and process.name() != "sshd":
                    found[process.pid] = " ".join(process.cmdline())
        return found

    def left(self, node: str, seconds: float = 10) -> dict[int, str]:
        """`processes` that are still there when `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while (found := self.processes(node)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _start(self, node: Node) -> None:
        own = ["unshare", *OWN, "--fork", "--kill-child", "--mount-proc"]
        sshd = str(shutil.which("sshd", path=SYSTEM_PATH))
        first = ["sh", "-euc", FIRST_PROCESS, "node", node.name, str(node.folder), sshd]
        with (node.folder / "start.log").open("w") as log:
            entering = subprocess.Popen(
                [*enter(self.switch, "--mount", "--net", "--pid"), *own, *first],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=system_environment(),
            )
        self._entered.append(entering)
        node.init = descendant(entering, 2)
        self._ip("link", "add", node.port, "type", "veth", "peer", "name", "eth0", "netns", str(node.init))
        self._ip("link", "set", node.port, "master", "bridge", "up")
        inside = [*enter(node.init, "--net"), "ip"]
        command([*inside, "address", "add", f"{node.address}/24", "dev", "eth0"])
        command([*inside, "link", "set", "eth0", "up"])

    def _ip(self, *words: str) -> None:
        command([*enter(self.switch, "--net"), "ip", *words])


@contextlib.contextmanager
def nodes(folder: Path, *names: str) -> Iterator[Cluster]:
    """A cluster of nodes with these names, on which each reaches all by ssh without a password. What they keep for
    themselves lies in `folder`."""
    cluster = Cluster(folder)
    for number, name in enumerate(names, start=1):
        cluster.nodes[name] = Node(name, number, folder / name)
    write_files(cluster)
    # `cat` ends when the other end of its input closes, so however this process ends, and with it all that runs below.
    below = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "cat"]
    with subprocess.Popen(below, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as outer:
        try:
            cluster.switch = descendant(outer, 1)
            cluster._ip("link", "add", "name", "bridge", "type", "bridge")
            cluster._ip("link", "set", "bridge", "up")
            for node in cluster.nodes.values():
                cluster._start(node)
            wait_for_sshd(cluster)
            yield cluster
        finally:
            outer.stdin.close()
            for entered in cluster._entered:
                entered.wait(START_SECONDS)


def write_files(cluster: Cluster) -> None:
    """What each node has of /etc and of a home: who is where, the host keys of all, and a key that all let in."""
    all_nodes = cluster.nodes.values()
    for node in all_nodes:
        (node.folder / "etc").mkdir(parents=True)
        (node.home / ".ssh").mkdir(parents=True, mode=0o700)
        new_key(node.folder / "etc" / "host_key", node.name)
    user = pwd.getpwuid(os.getuid()).pw_name
    key = cluster.folder / "key"
    new_key(key, user)
    known = [f"{node.name},{node.address} {(node.folder / 'etc' / 'host_key.pub').read_text()}" for node in all_nodes]
    hosts = ["127.0.0.1 localhost\n", *(f"{node.address} {node.name}\n" for node in all_nodes)]
    for node in all_nodes:
        etc, ssh = node.folder / "etc", node.home / ".ssh"
        (etc / "hosts").write_text("".join(hosts))
        (etc / "sshd_config").write_text(SSHD.format(folder=node.folder))
        # ssh and sshd find a home here, whatever HOME says; and sshd lets nobody in who is locked here.
        (etc / "passwd").write_text(changed(Path("/etc/passwd"), user, {5: str(node.home)}))
        (etc / "shadow").write_text(changed(Path("/etc/shadow"), user, {1: "*"}))
        (ssh / "known_hosts").write_text("".join(known))
        shutil.copy(key, ssh / "id_ed25519")
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")


def changed(table: Path, user: str, fields: Mapping[int, str]) -> str:
    """The text of a table of /etc with some fields of `user` changed."""
    rows = [line.split(":") for line in table.read_text().splitlines()]
    for row in rows:
        for number, value in fields.items() if row[0] == user else ():
            row[number] = value
    return "".join(":".join(row) + "\n" for row in rows)


def new_key(path: Path, comment: str) -> None:
    command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])


def command(words: Sequence[str]) -> None:
    """Runs what must succeed, and takes no time."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS, env=system_environment())
    assert done.returncode == 0, f"{words}: {done.stderr}"


def system_environment() -> dict[str, str]:
    return {**os.environ, "PATH": SYSTEM_PATH}


def enter(process: int, *namespaces: str) -> list[str]:
    """What a command begins with that is to run in these namespaces of `process`."""
    return ["nsenter", f"--target={process}", *namespaces, "--"]


def descendant(process: subprocess.Popen, depth: int) -> int:
    """The only child of the only child... of a process, once there is one."""
    found, deadline = process.pid, time.monotonic() + START_SECONDS
    for _ in range(depth):
        while not (children := psutil.Process(found).children()):
            running = process.poll() is None and time.monotonic() < deadline
            assert running, f"{process.args} did not start"
            time.sleep(0.01)
        found = children[0].pid
    return found


def wait_for_sshd(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    for node in cluster.nodes.values():
        while not node.listens():
            logs = "".join(log.read_text() for log in node.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"no sshd on {node.name}: {logs}"
            time.sleep(0.02)
