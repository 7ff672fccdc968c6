"""The hosts of a cluster: the hostfile that names them, and how they are reached. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

LINE = re.compile(r"(?P<name>[^\s=]+)\s+slots\s*=\s*(?P<slots>\d+)")
"""As DeepSpeed reads it."""
MOST_SLOTS = 1024
"""More than any host has: a slip of the pen, with which shares would be looked for without end."""
LOCALHOST = "localhost"
SSH = "STRETTO_SSH"
"""The environment variable that names another ssh, with its options."""
OPTIONS = {
    "BatchMode": "yes",  # a question would wait for an answer for ever
    "ConnectTimeout": "10",
    "ControlPath": "none",  # a connection that is shared would be lost for all at once
    "ServerAliveInterval": "4",
    "ServerAliveCountMax": "3",
}
CROSSING = (
    "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "OMP_", "MKL_",
    "DS_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "AWS_", "GOOGLE_", "WANDB_", "TOKENIZERS_PARALLELISM", "STRETTO_",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "ALL_PROXY",
    "FI_", "UCX_", "LD_LIBRARY_PATH", "LD_PRELOAD", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHASHSEED", "TMPDIR",
)  # fmt: skip
"""How the names begin of the variables that cross to every host; the recipe's `environment` names more."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """GPUs, or processes where there are none."""

    @property
    def here(self) -> bool:
        """Whether it is this machine, which is not reached by ssh."""
        return is_here(self.name)


def is_here(name: str) -> bool:
    return name in (LOCALHOST, socket.gethostname())


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile: `NAME slots=N` a line; empty lines and what follows a # are left out.

    Raises UserError with all that is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no hostfile {path}: write one line a host, such as `node1 slots=8`.") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path} is not a hostfile: it must hold lines such as `node1 slots=8`.") from None
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            problems.append(f"{path}, line {number}: {text!r} is not such as `node1 slots=8`.")
        elif match["name"].startswith("-"):
            problems.append(f"{path}, line {number}: {match['name']!r} is not the name of a host.")
        elif set(match["name"]) & set("@:"):
            problems.append(
                f"{path}, line {number}: {match['name']!r} holds @ or :, where deepspeed takes a name to end. Write a "
                "plain name, and put its user and address (User, HostName) into ~/.ssh/config."
            )
        elif match["name"] in (host.name for host in hosts):
            problems.append(f"{path}, line {number}: {match['name']} is named twice.")
        elif int(match["slots"]) == 0:
            problems.append(f"{path}, line {number}: {match['name']} has no slots: leave the line out.")
        elif int(match["slots"]) > MOST_SLOTS:
            problems.append(
                f"{path}, line {number}: {match['name']} has {match['slots']} slots, more than {MOST_SLOTS}: write how "
                "many GPUs it has, or processes where it has none."
            )
        else:
            hosts.append(Host(match["name"], int(match["slots"])))
    if not hosts and not problems:
        problems.append(f"{path} names no host: write one line each, such as `node1 slots=8`.")
    if len(hosts) > 1 and LOCALHOST in (host.name for host in hosts):
        problems.append(f"{path}: the other hosts cannot reach {LOCALHOST}; write {socket.gethostname()} instead.")
    if problems:
        raise UserError("\n".join(problems))
    return hosts


def on_host(name: str, command: Sequence[str]) -> list[str]:
    """`command` as it is started from here on a host: by ssh, but for this machine.

    ssh gives a command to a shell there, so it is quoted; PYTHONPATH goes along, since Python needs it to start.
    """
    if is_here(name):
        return list(command)
    path = os.environ.get("PYTHONPATH")
    remote = ["env", f"PYTHONPATH={path}", *command] if path else list(command)
    options = [part for key, value in OPTIONS.items() for part in ("-o", f"{key}={value}")]
    return [*ssh(), *options, name, f"exec {shlex.join(remote)}"]


def module_on(name: str, module: str, *arguments: str) -> list[str]:
    """`python -m module` on a host. Python is where it is here: hosts share their disk, or are set up alike."""
    return on_host(name, [sys.executable, "-m", module, *arguments])


def ssh() -> list[str]:
    """Raises UserError where there is none."""
    named = os.environ.get(SSH, "ssh")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise UserError(f"{SSH} is {named!r}, which is no command: {str(error).lower()}.") from None
    if not command or shutil.which(command[0]) is None:
        raise UserError(f"{' '.join(command) or 'ssh'} is not installed: other hosts are reached by it ({SSH}).")
    return command


def crossing(more: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this process that hosts get: those in the list, and those named by `more`."""
    return {
        name: value for name, value in sorted(os.environ.items()) if name in more or name.startswith(tuple(CROSSING))
    }
