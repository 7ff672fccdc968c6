"""Runs the quickstart in a new folder and records what it took: time, memory of all processes, prompt adherence.

    python benchmarks/quickstart.py benchmarks/records/quickstart.json

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import gib, origin, write

LIBRARIES = ("torch", "deepspeed", "mosaicml-streaming", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change")
    arguments = parser.parse_args()
    record = origin(LIBRARIES)
    record["command"] = " ".join(["stretto", "run", "quickstart", "-o", "RUN", *arguments.overrides])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "quickstart"
        first, peak = measured(run, arguments.overrides)
        again, _ = measured(run, arguments.overrides)
        report = json.loads((run / "report.json").read_text())
    record |= {
        "seconds": round(first, 1),
        "seconds_when_unchanged": round(again, 1),
        "peak_memory_gib": gib(peak),
        "stage_seconds": report["seconds"],
        "adherence": report["adherence"],
    }
    write(arguments.record, record)
    print(json.dumps(record, indent=2))


def measured(run: Path, overrides: list[str]) -> tuple[float, int]:
    """Seconds and largest proportional set size (bytes, shared pages divided) of all processes of one run."""
    started, peak = time.monotonic(), 0
    process = psutil.Popen([sys.executable, "-m", "launcher", "run", "quickstart", "-o", str(run), *overrides])
    while process.poll() is None:
        peak = max(peak, sum(memory(one) for one in (process, *process.children(recursive=True))))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - started, peak


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it has ended
        return 0


if __name__ == "__main__":
    main()
