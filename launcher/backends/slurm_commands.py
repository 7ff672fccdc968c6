"""The commands of Slurm. They are asked as a user would ask them: no library of a certain version is needed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence

from model.errors import UserError

UNKNOWN_JOB = "Invalid job id"
ANSWER_SECONDS = 60
JOB = re.compile(r"(\d+) ([A-Z_]+) (.+)")
REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def states(handles: Sequence[str]) -> dict[str, str]:
    """The states of those of the jobs that Slurm still knows; it forgets them some minutes after their end."""
    try:
        listed = ask("squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={','.join(handles)}")
    except UserError as error:
        if UNKNOWN_JOB in str(error):  # said of one job, not of one among several
            return {}
        raise
    return dict(line.split(maxsplit=1) for line in listed.splitlines())


def own_jobs() -> Iterator[tuple[str, str, str]]:
    """Number, state and script of each job of this user that Slurm still knows, by their numbers. Only the script
    names a run folder and a stage without doubt: jobs of several runs may have the same name."""
    listed = ask("squeue", "--me", "--noheader", "--states=all", "--sort=i", "--format=%i %T %o")
    for line in listed.splitlines():
        if match := JOB.fullmatch(line):  # not a part of an array of jobs, or of a path with a line break
            yield match[1], match[2], match[3]


def ask(*command: str, text: str | None = None) -> str:
    """What a command of Slurm says. Raises UserError where there is none, and with its words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, input=text, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here: give the command on a login node of a Slurm cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {ANSWER_SECONDS} s: try again later.") from None
    if done.returncode:
        said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise UserError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout


def hostnames(nodes: str) -> list[str]:
    """The hosts of a list such as `node[001-004,007]`."""
    return ask("scontrol", "show", "hostnames", nodes).split()


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]: how Slurm says how many tasks each node of a job has."""
    return [int(number) for number, times in REPEATED.findall(text) for _ in range(int(times or 1))]
