"""Asks hosts something, all at once, and says in plain words why one cannot be reached. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from launcher.hosts import crossing, is_here, module_on, ssh
from launcher.processes import Task

ASK_SECONDS = 60.0
"""Python may have to come over a slow disk."""
END_SECONDS = 5.0
AT_ONCE = 64
UNREACHABLE = 255
"""What ssh ends with when it has not reached a host."""
NO_SUCH_COMMAND = 127
REFUSALS = (
    ("could not resolve", "Correct its name in the hostfile, or add it to /etc/hosts or ~/.ssh/config."),
    ("connection refused", "Start sshd there, or name its port in ~/.ssh/config."),
    ("timed out", "See whether it is up, and whether a firewall keeps port 22 closed."),
    ("no route to host", "See whether it is up and in the same network."),
    ("network is unreachable", "See whether this machine is in its network."),
)
"""What ssh says, and what to do about it."""
CHANGED = "REMOTE HOST IDENTIFICATION HAS CHANGED"
UNKNOWN = "Host key verification failed"
DENIED = "Permission denied"


@dataclass(frozen=True)
class Answer:
    """What a host has said, or why it has said nothing."""

    said: Any
    """None where there is a failure."""
    failure: str
    remedy: str
    asked: float
    """When, in seconds since 1970 by the clock of this machine."""
    answered: float


def ask_all(names: Iterable[str], ask_one: Callable[[str], Answer]) -> dict[str, Answer]:
    """`ask_one` of every host at once."""
    names = list(names)
    with ThreadPoolExecutor(max(1, min(len(names), AT_ONCE))) as pool:
        return dict(zip(names, pool.map(ask_one, names), strict=True))


def ask(name: str, module: str, *arguments: str, limit: float = ASK_SECONDS) -> Answer:
    """Runs one of our modules on a host and reads the JSON that it prints last."""
    return _ask(name, module, module_on(name, module, *arguments), "", limit)


def ask_as_a_run(name: str, place: str, module: str, *arguments: str, limit: float = ASK_SECONDS) -> Answer:
    """As `ask`, of a module that is started as a run starts its ranks: below a guard, with the variables that cross.
    `place` is where our packages lie there."""
    command = [sys.executable, "-m", module, *arguments]
    task = Task(command, place, crossing(), sharers=1, lease=limit + END_SECONDS)
    return _ask(name, module, module_on(name, "launcher.guard"), json.dumps(task.to_json()) + "\n", limit)


def _ask(name: str, module: str, command: list[str], told: str, limit: float) -> Answer:
    """The input stays open until the command ends, or is to end because the time is up: a guard heeds it."""
    asked = time.time()
    reading, writing = os.pipe()
    with subprocess.Popen(command, stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(reading)
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, told.encode())
        ended = _outputs(process, limit)
        os.close(writing)
        if ended is None:
            # What the guard of a host runs ends when the input closes; the rest ends with its ssh.
            if _outputs(process, END_SECONDS) is None:
                process.kill()
            remedy = "See whether it is overloaded, or its disks hang."
            return Answer(None, f"has not answered within {limit:.0f} s", remedy, asked, time.time())
    said = last_json(ended[0])
    if process.returncode == 0 and said is not None:
        return Answer(said, "", "", asked, time.time())
    return Answer(None, *why(name, module, process.returncode, ended[1]), asked, time.time())


def _outputs(process: subprocess.Popen[str], limit: float) -> tuple[str, str] | None:
    try:
        return process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return None


def last_json(output: str) -> Any:
    """Of the last line, since a shell's start-up files may print too."""
    try:
        return json.loads(output.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        return None


def why(name: str, module: str, code: int, errors: str) -> tuple[str, str]:
    """Why a module has not run on a host, by the exit code and what was said; and what to do about it."""
    last = (errors.strip().splitlines() or ["no words"])[-1].strip().rstrip(".")
    if code == UNREACHABLE and not is_here(name):
        return _unreachable(name, errors, last)
    if code == NO_SUCH_COMMAND:
        remedy = "Install Python and Stretto there at the same place as here, or on a disk that all hosts share."
        return f"has no {sys.executable}", remedy
    if f"No module named '{module.partition('.')[0]}'" in errors or f"No module named {module}" in errors:
        remedy = f"Install it for {sys.executable} there, or put it on a disk that all hosts share."
        return "has no Stretto, or an older one", remedy
    where = shlex.join([sys.executable, "-m", module])
    return f"could not run {module}: {last} (exit code {code})", f"Run `{where}` there and see."


def _unreachable(name: str, errors: str, last: str) -> tuple[str, str]:
    if CHANGED in errors:
        known, port = _known_hosts(name)
        removing = re.search(r"ssh-keygen -f .+ -R .+", errors)
        remove = removing[0].strip() if removing else f"ssh-keygen -f {known} -R {name}"
        remedy = (
            f"If it was set up anew, remove the old key: {remove}; then take the new one: "
            f"ssh-keyscan {port}{name} >> {known}. If it was not, another machine answers in its place."
        )
        return "cannot be reached: its ssh key is not the one that is known", remedy
    if UNKNOWN in errors:
        known, port = _known_hosts(name)
        remedy = f"Add it: ssh-keyscan {port}{name} >> {known}, or answer yes to `{shlex.join([*ssh(), name])}`."
        return f"cannot be reached: its ssh key is not in {known}", remedy
    if DENIED in errors:
        remedy = f"Let it know your key: ssh-copy-id {name}. A key with a passphrase needs an ssh-agent."
        return f"lets nobody in from here without a password: {last}", remedy
    remedy = next((remedy for words, remedy in REFUSALS if words in errors.lower()), "")
    return f"cannot be reached: {last}", remedy or f"`{shlex.join([*ssh(), name])}` must work without a question."


def _known_hosts(name: str) -> tuple[str, str]:
    """The file in which ssh looks for the key of a host, and the option by which ssh-keyscan gets its port."""
    told = subprocess.run(
        [*ssh(), "-G", name], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=END_SECONDS
    )
    settings = dict(line.split(" ", 1) for line in told.stdout.splitlines() if " " in line)
    files, port = settings.get("userknownhostsfile", "~/.ssh/known_hosts").split(), settings.get("port", "22")
    return files[0], "" if port == "22" else f"-p {port} "
