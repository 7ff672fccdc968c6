"""What is wrong with the hosts of a hostfile, looked at before a run starts and when a lost host answers again. Imports
no torch."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.host_report import report
from launcher.hosts import Host
from launcher.reach import Answer, ask, ask_all
from launcher.recipe import RECIPE
from launcher.units import counted, size
from model import artifact
from model.errors import UserError

Report = Mapping[str, Any]
"""What launcher.host_report says of a host."""
SAME = "install the same on every host, or put it on a disk that all share."


def check_hosts(hosts: Sequence[Host], run: Path, needed_bytes: int = 0) -> dict[str, str]:
    """Where the other hosts reach each host, by its name. `run` need not be there yet.

    Raises UserError with everything that keeps the hosts from working together in `run`, one line each.
    """
    own, answers = ask_hosts(hosts, run)
    problems = [f"{name} {answer.failure}. {answer.remedy}" for name, answer in answers.items() if answer.failure]
    for host in hosts:
        problems += amiss(host, report_of(host, own, answers), own)
    problems += [*missing_gpus(hosts, own, answers), *named_twice(hosts, own, answers)]
    if own["folder"]["refused"]:
        problems.append(
            f"{own['folder']['path']} cannot be written: {own['folder']['refused']}. Choose another with -o."
        )
    if own["folder"]["free"] < needed_bytes:
        problems.append(
            f"the disk of {run} has {size(own['folder']['free'])} free; this run needs about {size(needed_bytes)}. "
            "Make room, or choose a folder on another disk with -o."
        )
    if problems:
        raise UserError("\n".join(problems))
    return addresses(hosts, answers)


def ask_hosts(hosts: Sequence[Host], run: Path, *options: str) -> tuple[Report, dict[str, Answer]]:
    """What this machine reports, and what the others answer; `options` are those of launcher.host_report.

    A run folder that is not there will be made in the nearest folder that is, so that one is looked at.
    """
    folder = next(place for place in (run.absolute(), *run.absolute().parents) if place.is_dir())
    others = [host.name for host in hosts if not host.here]
    with _marked(folder) as marker:
        given = ["--run", str(folder), "--marker", marker, *options]
        answers = ask_all(others, lambda name: ask(name, "launcher.host_report", *given))
        return report(folder, marker), answers


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """The name of a file that is in `folder` for a while, so that it is known again."""
    # Named as what a recipe is written under: a run clears it away where this process is killed.
    marker = folder / f".{RECIPE}{artifact.PARTIAL}-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):  # the report says that the folder cannot be written
        marker.touch(exist_ok=False)
    try:
        yield marker.name
    finally:
        with contextlib.suppress(OSError):
            marker.unlink(missing_ok=True)


def report_of(host: Host, own: Report, answers: Mapping[str, Answer]) -> Report | None:
    return own if host.here else answers[host.name].said


def amiss(host: Host, there: Report | None, own: Report) -> list[str]:
    """What keeps a host that has answered from working together with this machine, one line each."""
    if there is None:
        return []
    lines = [*other_code(there, own), *other_versions(there, own)]
    if own.keys() <= there.keys():  # else its code is so different that the rest means nothing
        lines += [*slots_problems(host, there), *folder_problems(there, own)]
    return [f"{host.name}: {line}" for line in lines]


def other_code(there: Report, own: Report) -> Iterator[str]:
    if there.get("code") != own["code"]:
        theirs, ours = f"{there.get('code')} in {there.get('place')}", f"{own['code']} in {own['place']}"
        yield f"its Stretto is not the one here (source {theirs}, here {ours}): {SAME}"


def other_versions(there: Report, own: Report) -> Iterator[str]:
    theirs = {"Python": _minor(there.get("python", "")), **there.get("packages", {})}
    for name, ours in {"Python": _minor(own["python"]), **own["packages"]}.items():
        if theirs.get(name) != ours:
            yield f"{name} is {theirs.get(name) or 'not installed'} there and {ours or 'not installed'} here: {SAME}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def slots_problems(host: Host, there: Report) -> Iterator[str]:
    if 0 < there["gpus"] < host.slots:
        have = counted(there["gpus"], "GPU")
        yield f"it has {have}, but the hostfile says slots={host.slots}: write slots={there['gpus']}."


def folder_problems(there: Report, own: Report) -> Iterator[str]:
    """Of the run folder there, which must be the one here."""
    seen, path = there["folder"], own["folder"]["path"]
    if not seen["there"]:
        yield f"it has no {path}: all hosts must share the run folder; mount its disk there at the same place."
    elif own["folder"]["marked"] and not seen["marked"]:
        yield f"its {path} is not the one here: all hosts must share the run folder; mount its disk there."
    elif seen["refused"]:
        yield f"it cannot write {path}: {seen['refused']}. Mount it writable there, for the same user."


def missing_gpus(hosts: Iterable[Host], own: Report, answers: Mapping[str, Answer]) -> Iterator[str]:
    """Hosts without GPUs among others that have some: ranks on them could not talk to each other."""
    reports = {host.name: report_of(host, own, answers) for host in hosts}
    have = [name for name, there in reports.items() if there and there.get("gpus")]
    for name, there in reports.items():
        if have and there and there.get("gpus") == 0:
            yield f"{name}: it has no GPU, and {have[0]} has: mend its driver (nvidia-smi), or leave it out."


def named_twice(hosts: Iterable[Host], own: Report, answers: Mapping[str, Answer]) -> Iterator[str]:
    """Machines that the hostfile names by two names."""
    first: dict[tuple[str, str], str] = {}
    for name, address in addresses(hosts, answers).items():
        machine = (answers[name].said if name in answers else own)["host"], address
        if machine in first:
            yield f"{first[machine]} and {name} are the same machine ({' at '.join(machine)}): name it once."
        first.setdefault(machine, name)


def addresses(hosts: Iterable[Host], answers: Mapping[str, Answer]) -> dict[str, str]:
    """Where the other hosts reach each host that has answered; its name where that is not known."""
    hosts = list(hosts)
    said = {name: answer.said for name, answer in answers.items() if answer.said}
    if len(hosts) == 1:
        return {host.name: "127.0.0.1" for host in hosts if host.here or said}
    from_here = [there["reached_from"] for there in said.values() if _own_address(there.get("reached_from"))]
    here = from_here[0] if from_here else socket.gethostname()
    found = {host.name: here for host in hosts if host.here}
    for name, there in said.items():
        at = there.get("reached_at")
        # By loopback ssh has come back to this machine, whatever name it went by.
        found[name] = name if at is None else here if ipaddress.ip_address(at).is_loopback else at
    return found


def _own_address(address: str | None) -> bool:
    """Whether it is one of this machine, by which others reach it: behind a jump host they see that one's."""
    if address is None or ipaddress.ip_address(address).is_loopback:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def returned(host: Host, said: str, own: Report) -> list[str]:
    """Why a host that answers again may not take part, one line each; none where it may. `said` is what
    launcher.host_report has printed there, and `own` what it reports here, of the run folder and one of its files."""
    try:
        there = json.loads(said)
    except json.JSONDecodeError:
        return [f"{host.name}: it has not said how it is: {said[:200]!r}."]
    return amiss(host, there, own)
