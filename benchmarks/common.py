"""What every benchmark needs: the machine, the versions, the commit, and how a record and its ratios are written."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.table import Table


def origin(libraries: Iterable[str], peer: str | None = None) -> dict[str, Any]:
    """What a record says of where it comes from, as things are before the measurement.

    `peer` is the argument that names an interpreter; where that lies on this machine is nobody's business.
    """
    command = ["python", *("PEER/bin/python" if argument == peer else argument for argument in sys.argv)]
    return {
        "command": shlex.join(command),
        "commit": output("git", "rev-parse", "HEAD"),
        # A record that another benchmark has just written is no change to what is measured.
        "clean": output("git", "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/records") == "",
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_gib": gib(psutil.virtual_memory().total),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def summary(seconds: list[float]) -> dict[str, Any]:
    """Repeated timings of one thing: the best, the median and each of them."""
    return {
        "best": round(min(seconds), 4),
        "median": round(median(seconds), 4),
        "seconds": [round(one, 4) for one in seconds],
    }


def ratios(wanted: Iterable[tuple[str, str, float | None]], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each (name, other, aim): how many times faster than `other` `name` is, where both were measured.

    `results` maps names to summaries of the time that each took for the same work.
    """
    rows = []
    for name, other, aim in wanted:
        if name in results and other in results:
            best, middle = (round(results[other][key] / results[name][key], 3) for key in ("best", "median"))
            rows.append({"name": name, "other": other, "of_medians": middle, "of_bests": best, "aim": aim})
    return rows


def ratio_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Times faster", title_justify="left")
    for heading in ("", "than"):
        table.add_column(heading)
    for heading in ("of medians", "of bests", "aim", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        met = "" if row["aim"] is None else "met" if row["of_medians"] >= row["aim"] else "not met"
        aim = "" if row["aim"] is None else f"{row['aim']:g}"
        table.add_row(row["name"], row["other"], f"{row['of_medians']:.3f}", f"{row['of_bests']:.3f}", aim, met)
    return table


def peak_memory() -> int:
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gib(size: int) -> float:
    return round(size / 2**30, 2)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
