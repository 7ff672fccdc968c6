"""Which condition paths, positions and patterns learn best on the built-in corpus, at equal steps.

    python benchmarks/conditions.py benchmarks/records/conditions.json --work DIR

Runs the quickstart once, then again from a copy of it for every variant: one stage is trained anew with other keys, the
others stay, and music is made and judged. `DIR` keeps the first run and each finished variant, so that the command goes
on where it was stopped. Speed is not measured: two variants run at a time, each on one core.

Variants train on one rank; the quickstart's own layout of a stage is taken from the first run, which trains on two.
Where there is no prefix and a step has one code of each quantizer at most, positions by index and by time are the same:
such a pair is one model trained twice, and its difference is what chance makes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import origin, output, write
from rich.console import Console
from rich.table import Table

LIBRARIES = ("torch", "deepspeed", "mosaicml-streaming", "numpy")


@dataclass(frozen=True)
class Variant:
    """One stage with other keys than the quickstart's."""

    stage: str
    conditioning: tuple[str, ...]
    other: tuple[str, ...] = ()
    """Paths of the semantic codes, for the coarse stage."""
    pattern: str = "delay"
    positions: str = "time"

    @property
    def name(self) -> str:
        paths = ["+".join(part) for part in (self.conditioning, self.other) if part]
        layout = [self.pattern] if self.stage == "coarse" else []
        return ", ".join([self.stage, *layout, "; ".join(paths), self.positions])

    @property
    def overrides(self) -> list[str]:
        conditions = [f"{{field: conditioning, paths: [{', '.join(self.conditioning)}]}}"]
        if self.other:
            conditions.append(f"{{field: semantic, paths: [{', '.join(self.other)}]}}")
        keys = {
            "model.conditions": f"[{', '.join(conditions)}]",
            "model.positions": self.positions,
            "train.ranks": "1",
        }
        if self.stage == "coarse":
            keys["model.pattern"] = self.pattern
        return [f"stages.{self.stage}.{key}={value}" for key, value in keys.items()]


VARIANTS = [
    Variant("semantic", ("summed",)),
    Variant("semantic", ("prefix",)),
    Variant("semantic", ("aligned",)),
    Variant("coarse", ("summed",), ("aligned",)),
    Variant("coarse", ("summed",), ("prefix",)),
    Variant("coarse", ("summed",), ("prefix",), positions="index"),
    Variant("coarse", ("summed",), ("aligned",), positions="index"),
    Variant("semantic", ("summed", "prefix")),
    Variant("semantic", ("summed",), positions="index"),
    Variant("coarse", ("prefix",), ("aligned",)),
    Variant("coarse", ("summed",), ("aligned", "prefix")),
    Variant("semantic", ("summed", "aligned")),
    Variant("coarse", ("summed",), ("aligned",), "flat"),
    Variant("coarse", ("prefix",), ("prefix",), "flat"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write, after every variant")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; it is kept")
    parser.add_argument("--jobs", type=int, default=2, help="variants at a time")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys for all runs, to try it small")
    arguments = parser.parse_args()
    record: dict[str, Any] = {**origin(LIBRARIES), "variants": {}}
    base = arguments.work / "base"
    run(base, arguments.overrides)
    record["quickstart"] = {stage: outcome(base, stage) for stage in ("semantic", "coarse")}

    def measure(variant: Variant) -> None:
        kept = arguments.work / f"{variant.name}.json"
        if not kept.exists():
            folder = arguments.work / variant.name.replace(" ", "-")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            run(folder, [*arguments.overrides, *variant.overrides])
            write(kept, {"commit": output("git", "rev-parse", "HEAD"), **outcome(folder, variant.stage)})
            shutil.rmtree(folder)
        record["variants"][variant.name] = json.loads(kept.read_text())
        write(arguments.record, record)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(measure, VARIANTS))
    show(record)


def run(folder: Path, overrides: list[str]) -> None:
    """The quickstart in `folder`, as far as it is not made yet. Its output goes to a log beside it."""
    command = [sys.executable, "-m", "launcher", "run", "quickstart", "-o", str(folder), *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
        )


def outcome(folder: Path, stage: str) -> dict[str, Any]:
    """The last validation of the stage, its best loss, and how well the music followed its prompts."""
    rows = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if row["kind"] == "validation"]
    last = validations[-1]
    report = json.loads((folder / "report.json").read_text())
    return {
        **{key: last.get(key) for key in ("step", "loss", "quantizers", "text", "shuffled")},
        "best_loss": min(row["loss"] for row in validations),
        "adherence": report["adherence"],
    }


def show(record: dict[str, Any]) -> None:
    table = Table(title="Losses in nats on validation windows; adherence of the whole", title_justify="left")
    for heading in ("stage, paths, positions", "loss", "best", "from text", "adherence"):
        table.add_column(heading, justify="left" if heading.startswith("stage") else "right")
    for name, row in record["variants"].items():
        text = "" if row["text"] is None else f"{row['text']:.3f}"
        followed = f"{row['adherence']['generated']['mean']:.2f}"
        table.add_row(name, f"{row['loss']:.3f}", f"{row['best_loss']:.3f}", text, followed)
    Console().print(table)


if __name__ == "__main__":
    main()
