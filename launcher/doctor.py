"""`stretto doctor`: what is missing or wrong on this machine, and what to do about it, before a run finds out."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from data.progress import Progress
from launcher import machine_checks as checks

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    name: str
    state: Literal["ok", "warning", "problem"]
    """A warning is what some runs do without, a problem what no run does."""
    found: str
    remedy: str = ""


def examine(folder: Path, progress: Progress | None = None) -> list[Finding]:
    """Looks at everything a run on this machine needs; `folder` is where it would be made."""
    wanted: Sequence[tuple[str, Callable[[], checks.Result]]] = (
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
        ("two ranks", checks.two_ranks),
    )
    findings = []
    for number, (name, check) in enumerate(wanted):
        if progress:
            progress.update(number, len(wanted), f"looking at {name}")
        findings.append(Finding(name, *check()))
    return findings


def print_findings(findings: Sequence[Finding], as_json: bool, console: Console) -> bool:
    """Shows what was found, with what to do; returns whether there is no problem."""
    well = not any(finding.state == "problem" for finding in findings)
    if as_json:
        told = {"host": socket.gethostname(), "well": well, "checks": [asdict(finding) for finding in findings]}
        print(json.dumps(told, indent=2), file=console.file)
        return well
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        console.print(
            f"{finding.name:<{width}}  {MARKS[finding.state]}  {escape(finding.found)}", highlight=False, soft_wrap=True
        )
        if finding.remedy:
            console.print(f"{'':<{width}}  → {escape(finding.remedy)}", highlight=False, soft_wrap=True)
    return well
