"""What a run needs of the hosts of a hostfile and of the network between them, for `stretto doctor --hostfile`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data.network import GLOO, NCCL
from data.progress import Progress
from launcher import preflight
from launcher.doctor import Finding
from launcher.host_network import Pair, Ports, add_up, rounds, try_ports
from launcher.hosts import Host
from launcher.preflight import Report, addresses, ask_hosts, comparable, reports_of
from launcher.processes import PORTS
from launcher.reach import Answer, ask_all, ask_as_a_run
from launcher.units import counted, duration, size

SLOW_SSH_SECONDS = 10.0
SKEW_WARNING, SKEW_PROBLEM = 1.0, 30.0
"""Seconds. By the clock: how old a lock is, whether a file has changed, which of two logs came first."""
CHECKS_SECONDS = 180.0
FAR_BELOW = 0.5
"""Of the median bandwidth."""


def examine_hosts(hosts: Sequence[Host], folder: Path, progress: Progress) -> dict[str, list[Finding]]:
    """What is found on each host, by its name, and between them; `folder` is where runs are to be made. The machine
    checks of a host that is this machine are left to who asks."""
    progress.update(0, 4, "asking all hosts")
    own, answers = ask_hosts(hosts, folder)
    reports = reports_of(hosts, own, answers)
    found = {host.name: list(host_findings(host, own, reports, answers.get(host.name))) for host in hosts}
    where = addresses(hosts, answers)
    for name, finding in _named_twice(reports, where):
        found[name].append(finding)
    progress.update(1, 4, "looking at each host")
    able = {name: there for name, there in reports.items() if comparable(there, own)}
    for name, findings in machine_findings([name for name in able if name in answers], reports, folder).items():
        found[name] += findings
    if len(able) > 1:
        progress.update(2, 4, "trying ports")
        ports = try_ports({name: where[name] for name in able})
        for name in able:
            found[name] += port_findings(name, ports.get(name), where[name], ports)
        progress.update(3, 4, "measuring the network")
        for name, findings in bandwidth_findings(measure(ports, reports, where)).items():
            found[name] += findings
    return found


def host_findings(host: Host, own: Report, reports: Mapping[str, Report], answer: Answer | None) -> Iterator[Finding]:
    """What its report shows. There is no answer of this machine."""
    if answer is None:
        yield Finding("ssh", "ok", "is this machine")
    elif answer.failure:
        yield Finding("ssh", "problem", answer.failure, answer.remedy)
        return
    else:
        yield ssh_finding(answer.answered - answer.asked)
    there = reports[host.name]
    yield from _findings("source", preflight.other_source(there, own), f"the same as here ({there.get('code')})")
    versions = ", ".join(f"{name} {there.get('packages', {}).get(name)}" for name in own["packages"])
    yield from _findings("versions", preflight.other_versions(there, own), versions)
    if not comparable(there, own):
        return
    gpus = counted(there["gpus"], "GPU") if there["gpus"] else "no GPU"
    wrong = [*preflight.too_many_slots(host, there), *preflight.missing_gpus(host.name, reports)]
    yield from _findings("slots", wrong, f"{counted(host.slots, 'slot')}, {gpus}, {counted(there['cores'], 'core')}")
    if answer is not None:
        yield clock_finding(skew(answer.asked, there["time"], answer.answered))
    free = f"{there['folder']['path']} is shared and can be written"
    yield from _findings("run folder", preflight.folder_not_shared(there, own), free)


def _findings(name: str, wrong: Iterable[tuple[str, str]], well: str) -> Iterator[Finding]:
    """A problem each, or that all is well."""
    problems = [Finding(name, "problem", found, remedy) for found, remedy in wrong]
    yield from problems or [Finding(name, "ok", well)]


def _named_twice(reports: Mapping[str, Report], where: Mapping[str, str]) -> Iterator[tuple[str, Finding]]:
    for first, second in preflight.named_twice(reports, where):
        remedy = "Name it once in the hostfile."
        yield second, Finding("name", "problem", f"is the same machine as {first}", remedy)


def ssh_finding(seconds: float) -> Finding:
    if seconds > SLOW_SSH_SECONDS:
        remedy = "See what it waits for: a name server (UseDNS no in sshd_config), or the disk with Python."
        return Finding("ssh", "warning", f"answered after {duration(seconds)}", remedy)
    return Finding("ssh", "ok", f"answered after {duration(seconds)}")


def skew(asked: float, there: float, answered: float) -> float:
    """Seconds by which the clock there is ahead of the one here, at least: it told the time between the two."""
    return there - answered if there > answered else min(0.0, there - asked)


def clock_finding(ahead: float) -> Finding:
    if abs(ahead) <= SKEW_WARNING:
        return Finding("clock", "ok", f"within {SKEW_WARNING:g} s of this machine's")
    found = f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    remedy = "Let all hosts take the time from the same place (chronyd or ntpd)."
    return Finding("clock", "problem" if abs(ahead) > SKEW_PROBLEM else "warning", found, remedy)


def machine_findings(names: Sequence[str], reports: Mapping[str, Report], folder: Path) -> dict[str, list[Finding]]:
    """The checks of a machine (launcher.doctor), as other hosts make them of themselves."""
    answers = ask_all(
        names,
        lambda name: ask_as_a_run(
            name, reports[name]["place"], "launcher.doctor", str(folder.absolute()), limit=CHECKS_SECONDS
        ),
    )
    return {
        name: [Finding("machine", "problem", answer.failure, answer.remedy)]
        if answer.failure
        else [Finding(**told) for told in answer.said]
        for name, answer in answers.items()
    }


def port_findings(name: str, own: Ports | None, address: str, ports: Mapping[str, Ports]) -> Iterator[Finding]:
    """Of its connections to the others, and of the network interfaces that these take."""
    if own is None:
        remedy = "Other hosts must reach it where ssh does: look at its addresses (ip address)."
        yield Finding("ports", "problem", f"cannot listen at {address}", remedy)
        return
    wrong = []
    for other, visit in own.visits.items():
        if visit["wrong"]:
            why = " and ".join(dict.fromkeys(visit["wrong"].values()))
            first, last = ports[other].range if other in ports else ("32768", "60999")
            remedy = f"Open TCP ports {PORTS[0]} to {PORTS[-1]} and {first} to {last} between hosts in the firewall."
            wrong.append((f"cannot connect to {other}, port {' and '.join(visit['wrong'])}: {why}", remedy))
    yield from _findings("ports", wrong, "connects to all others")
    used = sorted({visit["interface"] for visit in own.visits.values() if visit["interface"]})
    missing = missing_interfaces(os.environ, own.interfaces)
    if missing:
        remedy = f"Name one that all hosts have: {', '.join(used)}."
        yield Finding("interface", "problem", f"{missing} names an interface that it does not have", remedy)
    elif len(used) > 1:
        remedy = f"Where ranks do not meet, name one that reaches all, by {GLOO} and {NCCL}."
        yield Finding("interface", "warning", f"reaches the others by {', '.join(used)}", remedy)
    elif used:
        yield Finding("interface", "ok", f"reaches the others by {used[0]}")


def missing_interfaces(environment: Mapping[str, str], interfaces: Sequence[str]) -> str:
    """The setting, which crosses to every host, that names none of the interfaces a host has."""
    for name in (GLOO, NCCL):
        value = environment.get(name, "")
        listed = tuple(value.lstrip("=").split(","))
        beginnings = name == NCCL and not value.startswith("=")
        found = any(one.startswith(listed) if beginnings else one in listed for one in interfaces)
        if value and not found and not value.startswith("^"):
            return f"{name}={value}"
    return ""


def measure(
    ports: Mapping[str, Ports], reports: Mapping[str, Report], where: Mapping[str, str]
) -> dict[Pair, float | str]:
    """What two hosts that connect to each other add up a second, or why they cannot."""

    def connected(one: str, other: str) -> bool:
        return not any(ports[a].visits.get(b, {"wrong": True})["wrong"] for a, b in ((one, other), (other, one)))

    found: dict[Pair, float | str] = {}
    for pairs in rounds(list(ports)):
        possible = [pair for pair in pairs if connected(*pair)]
        found |= add_up(possible, reports, where, {name: told.ports[0] for name, told in ports.items()})
    return found


def bandwidth_findings(measured: Mapping[Pair, float | str]) -> dict[str, list[Finding]]:
    """A host is as fast as with the fastest other: where it is slow with one, that one may be to blame."""
    found: dict[str, list[Finding]] = {}
    best: dict[str, tuple[float, str]] = {}
    for pair, speed in measured.items():
        for name, other in (pair, pair[::-1]):
            if isinstance(speed, str):
                remedy = f"See which interface they use: set {GLOO} and {NCCL} to the one that works (ip address)."
                wrong = Finding("all-reduce", "problem", f"does not add up numbers with {other}: {speed}", remedy)
                found.setdefault(name, []).append(wrong)
            else:
                best[name] = max(best.get(name, (0.0, "")), (speed, other))
    median = statistics.median(speed for speed, _ in best.values()) if best else 0.0
    for name, (speed, other) in best.items():
        said = f"{size(speed)}/s with {other}"
        if speed < FAR_BELOW * median:
            remedy = "Look at its network: which interface it takes, its cable, its port of the switch."
            slow = Finding("all-reduce", "warning", f"{said}; the median is {size(median)}/s", remedy)
            found.setdefault(name, []).append(slow)
        else:
            found.setdefault(name, []).append(Finding("all-reduce", "ok", said))
    return found
