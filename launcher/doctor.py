"""`stretto doctor`: what is missing or wrong on this machine, and what to do about it, before a run finds out."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from data.progress import Progress
from launcher import machine_checks as checks
from launcher.units import counted

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
MANY = 8
"""More hosts than this are counted, not named, where they are well."""


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    name: str
    state: Literal["ok", "warning", "problem"]
    """A warning is what some runs do without, a problem what no run does."""
    found: str
    remedy: str = ""


def examine(folder: Path, progress: Progress | None = None, ranks: bool = True) -> list[Finding]:
    """Looks at everything a run on this machine needs; `folder` is where it would be made. With `ranks`, two are
    started."""
    wanted: list[tuple[str, Callable[[], checks.Result]]] = [
        ("python", checks.python),
        ("packages", checks.packages),
        ("gpus", checks.gpus),
        ("compiler", checks.compiler),
        ("attention", checks.attention),
        ("memory", checks.memory),
        ("shared memory", checks.shared_memory),
        ("disk", lambda: checks.disk(folder)),
        ("open files", checks.open_files),
        ("host name", checks.host_name),
        ("audio", checks.audio),
        ("hub cache", checks.hub_cache),
    ]
    if ranks:
        wanted.append(("two ranks", checks.two_ranks))
    findings = []
    for number, (name, check) in enumerate(wanted):
        if progress:
            progress.update(number, len(wanted), f"looking at {name}")
        findings.append(Finding(name, *check()))
    return findings


def print_findings(
    findings: Sequence[Finding], as_json: bool, console: Console, hosts: Mapping[str, Sequence[Finding]] | None = None
) -> bool:
    """Shows what was found on this machine and on `hosts`, with what to do; returns whether there is no problem."""
    of_all = [*findings, *(finding for found in (hosts or {}).values() for finding in found)]
    well = not any(finding.state == "problem" for finding in of_all)
    if as_json:
        told = {"host": socket.gethostname(), "well": well, "checks": [asdict(finding) for finding in findings]}
        if hosts is not None:
            told["hosts"] = {name: [asdict(finding) for finding in found] for name, found in hosts.items()}
        print(json.dumps(told, indent=2), file=console.file)
        return well
    width = max(len(finding.name) for finding in of_all)
    for finding in findings:
        _print(finding, width, console)
    if hosts is not None:
        console.print(f"\n{counted(len(hosts), 'host')} of the hostfile:", highlight=False)
        for finding in together(hosts):
            _print(finding, width, console)
    return well


def together(hosts: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """What was found on hosts, check by check: where it is the same on several, it is said once, with their names."""
    for name in dict.fromkeys(finding.name for found in hosts.values() for finding in found):
        same: dict[Finding, list[str]] = {}
        for host, found in hosts.items():
            for finding in found:
                if finding.name == name:
                    same.setdefault(finding, []).append(host)
        well = {finding: names for finding, names in same.items() if finding.state == "ok"}
        if sum(map(len, well.values())) > MANY and len(well) > 1:
            first, names = next(iter(well.items()))
            yield replace(first, found=f"{sum(map(len, well.values()))} hosts, such as {names[0]}: {first.found}")
            same = {finding: names for finding, names in same.items() if finding not in well}
        for finding, names in same.items():
            named = ", ".join(names) if len(names) <= MANY or finding.state != "ok" else f"{len(names)} hosts"
            yield replace(finding, found=f"{named}: {finding.found}")


def _print(finding: Finding, width: int, console: Console) -> None:
    line = f"{finding.name:<{width}}  {MARKS[finding.state]}  {escape(finding.found)}"
    console.print(line, highlight=False, soft_wrap=True)
    if finding.remedy:
        console.print(f"{'':<{width}}  → {escape(finding.remedy)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":  # how the doctor of another machine asks
    print(json.dumps([asdict(finding) for finding in examine(Path(sys.argv[1]), ranks=False)]))
