"""Measures what the launcher adds: to stages side by side, between stages in a row, and to a look at a large run.

    python benchmarks/launching.py benchmarks/records/launching.json

Side by side: semantic, coarse and fine on disjoint shares (2, 1 and 1) of a hostfile of 4 slots, each rank asleep for
`--seconds` under the real `deepspeed` command, beside each of them alone with the same share; they take turns. Ranks
sleep because a machine with fewer cores than ranks could show nothing but its cores. In a row: the time from the end of
the work of one stage to the start of the next one's, of processes that import nothing. Status: `stretto status --json`
of a run with 1,000 attempts in its history and 100 MB of metrics. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import origin, summary, write
from rich.console import Console

from launcher.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).parent.parent
STAGES = ("semantic", "coarse", "fine")
LIBRARIES = ("torch", "deepspeed", "psutil", "rich")
AIMS = {"side_by_side": 1.25, "between_stages": 2.0, "status": 1.0}
"""At most: times the longest alone; seconds; seconds."""
METRICS_BYTES = 100_000_000
ATTEMPTS = 1_000


def sleeping(folder: Path, seconds: float, *names: str) -> tuple[float, Path]:
    """Wall time of stages that sleep, and their run folder."""
    hostfile = folder / "hosts"
    hostfile.write_text("localhost slots=4\n")
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, str(ROOT / "benchmarks" / "sleeping_stage.py"), str(run), str(hostfile), str(seconds)]
    started = time.perf_counter()
    subprocess.run([*command, *names], check=True, cwd=ROOT)
    return time.perf_counter() - started, run


def between(run: Path) -> list[float]:
    """Seconds from the end of each stage's work to the start of the next one's."""
    times = [json.loads((run / f"{name}.times").read_text()) for name in STAGES]
    return [later["began"] - earlier["ended"] for earlier, later in itertools.pairwise(times)]


def large_run(folder: Path) -> Path:
    """A run folder with a long history and much written by its trainings, none of which was validated."""
    run = folder / "large"
    row = {"kind": "train", "step": 0, "loss": 1.5, "windows_per_second": 100.0, "quantizers": [1.5] * 3}
    row |= {"figures": {f"figure_{number}": 0.123456789 for number in range(20)}}
    for name in STAGES:
        (run / name).mkdir(parents=True)
        written, step = 0, 0
        with (run / name / "metrics.jsonl").open("w") as file:
            while written < METRICS_BYTES / len(STAGES):
                step += 1
                written += file.write(json.dumps({**row, "step": step}) + "\n")
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    entry = {"state": "interrupted", "started": 1.0, "finished": 2.0, "seconds": 1.0, "restarts": ATTEMPTS}
    (run / "state.json").write_text(json.dumps({"format_version": 1, "stages": dict.fromkeys(STAGES, entry)}))
    attempt = {"time": 1.0, "hosts": "alpha:0-7 beta:0-7", "seconds": 1.0, "code": 76, "lost": []}
    lines = [{**attempt, "stage": STAGES[number % 3], "attempt": number // 3} for number in range(ATTEMPTS)]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def status(run: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "launcher", "status", str(run), "--json"], check=True, cwd=ROOT, capture_output=True
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each rank sleeps")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    record = origin(LIBRARIES)
    times: dict[str, list[float]] = {name: [] for name in (*STAGES, "together")}
    gaps, looks = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = large_run(place)
        for _ in range(arguments.rounds):
            for name in STAGES:
                times[name].append(sleeping(place, arguments.seconds, name)[0])
            times["together"].append(sleeping(place, arguments.seconds, *STAGES)[0])
            gaps += between(sleeping(place, 0.0, "chain")[1])
            looks += [status(run) for _ in range(5)]
    longest = [max(times[name][number] for name in STAGES) for number in range(arguments.rounds)]
    shares = [together / alone for together, alone in zip(times["together"], longest, strict=True)]
    record["results"] = {
        "slept": arguments.seconds,
        "side_by_side": {"times_the_longest_alone": summary(shares), **{name: summary(times[name]) for name in times}},
        "between_stages": summary(gaps),
        "status": {"metrics_bytes": METRICS_BYTES, "attempts": ATTEMPTS, **summary(looks)},
        "aims": AIMS,
    }
    write(arguments.record, record)
    console = Console()
    console.print(f"side by side: {sorted(shares)[len(shares) // 2]:.3f} times the longest alone")
    console.print(
        f"between stages: {sorted(gaps)[len(gaps) // 2]:.2f} s; status: {sorted(looks)[len(looks) // 2]:.2f} s"
    )


if __name__ == "__main__":
    main()
