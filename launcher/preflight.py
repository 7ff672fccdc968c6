"""What is wrong with the hosts of a hostfile, looked at before a run starts and when a lost host answers again. Imports
no torch."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.host_report import report
from launcher.hosts import Host
from launcher.reach import Answer, ask, ask_all, last_json
from launcher.recipe import RECIPE
from launcher.units import counted
from model import artifact
from model.errors import UserError

Report = Mapping[str, Any]
"""What launcher.host_report says of a host."""
Wrong = Iterator[tuple[str, str]]
"""What is wrong with a host, and what to do about it."""
SAME = "Install the same on every host, or put it on a disk that all share."


def check_hosts(hosts: Sequence[Host], run: Path, all_hosts: bool = True) -> dict[str, str]:
    """Where the other hosts reach each host, by its name. `run` need not be there yet.

    Raises UserError with everything that keeps the hosts from working together in `run`, one line each; that one
    cannot be reached counts only where they must be `all_hosts`.
    """
    own, answers = ask_hosts(hosts, run)
    reports = reports_of(hosts, own, answers)
    failed = {name: answer for name, answer in answers.items() if answer.failure and all_hosts}
    problems = [f"{name} {answer.failure}. {answer.remedy}" for name, answer in failed.items()]
    for host in hosts:
        problems += amiss(host, reports.get(host.name, {}), own)
        problems += [f"{host.name}: {found}. {remedy}" for found, remedy in missing_gpus(host.name, reports)]
    found = addresses(hosts, answers)
    for first, second in named_twice(reports, found):
        problems.append(f"{first} and {second} are the same machine: name it once in the hostfile.")
    if own["folder"]["refused"]:
        problems.append(
            f"{own['folder']['path']} cannot be written: {own['folder']['refused']}. Choose another with -o."
        )
    if problems:
        raise UserError("\n".join(problems))
    return found


def ask_hosts(hosts: Sequence[Host], run: Path) -> tuple[Report, dict[str, Answer]]:
    """What this machine reports, and what the others answer to launcher.host_report.

    A run folder that is not there will be made in the nearest folder that is, so that one is looked at.
    """
    folder = next(place for place in (run.absolute(), *run.absolute().parents) if place.is_dir())
    others = [host.name for host in hosts if not host.here]
    with _marked(folder) as marker:
        given = ["--run", str(folder), "--marker", marker]
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


def reports_of(hosts: Iterable[Host], own: Report, answers: Mapping[str, Answer]) -> dict[str, Report]:
    """What is known of the hosts that have answered, by their names."""
    found = {host.name: own if host.here else answers[host.name].said for host in hosts}
    return {name: there for name, there in found.items() if there is not None}


def amiss(host: Host, there: Report, own: Report) -> list[str]:
    """What keeps a host that has reported from working together with this machine, one line each."""
    if not there:
        return []
    wrong = [*other_source(there, own), *other_versions(there, own)]
    if comparable(there, own):
        wrong += [*too_many_slots(host, there), *folder_not_shared(there, own)]
    return [f"{host.name}: {found}. {remedy}" for found, remedy in wrong]


def comparable(there: Report, own: Report) -> bool:
    """Whether a report says at least what ours does: one of another version may not."""
    return own.keys() <= there.keys()


def other_source(there: Report, own: Report) -> Wrong:
    if there.get("code") != own["code"]:
        theirs, ours = f"{there.get('code')} in {there.get('place')}", f"{own['code']} in {own['place']}"
        yield f"its Stretto is not the one here (source {theirs}, here {ours})", SAME


def other_versions(there: Report, own: Report) -> Wrong:
    theirs = {"Python": _minor(there.get("python", "")), **there.get("packages", {})}
    for name, ours in {"Python": _minor(own["python"]), **own["packages"]}.items():
        if theirs.get(name) != ours:
            yield f"{name} is {theirs.get(name) or 'not installed'} there and {ours or 'not installed'} here", SAME


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def too_many_slots(host: Host, there: Report) -> Wrong:
    if 0 < there["gpus"] < host.slots:
        found = f"it has {counted(there['gpus'], 'GPU')}, but the hostfile says slots={host.slots}"
        yield found, f"Write slots={there['gpus']}."


def missing_gpus(name: str, reports: Mapping[str, Report]) -> Wrong:
    """Ranks on a host without GPUs could not talk to those on hosts that have some."""
    have = [other for other, there in reports.items() if there.get("gpus")]
    if have and name in reports and reports[name].get("gpus") == 0:
        yield f"it has no GPU, and {have[0]} has", "Mend its driver (nvidia-smi), or leave it out of the hostfile."


def folder_not_shared(there: Report, own: Report) -> Wrong:
    seen, path = there["folder"], own["folder"]["path"]
    if not seen["there"]:
        yield f"it has no {path}", "All hosts must share the run folder: mount its disk there, at the same place."
    elif own["folder"]["marked"] and not seen["marked"]:
        yield f"its {path} is not the one here", "All hosts must share the run folder: mount its disk there."
    elif seen["refused"]:
        yield f"it cannot write {path}: {seen['refused']}", "Mount it writable there, for the same user."


def named_twice(reports: Mapping[str, Report], found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Two names by which the hostfile names the same machine; `found` are the addresses of all."""
    first: dict[tuple[str, str], str] = {}
    for name, there in reports.items():
        machine = there["host"], found[name]
        if machine in first:
            yield first[machine], name
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
    there = last_json(said)
    if not isinstance(there, dict):
        return [f"{host.name}: it has not said how it is: {said[:200]!r}."]
    return amiss(host, there, own)
