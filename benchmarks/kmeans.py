"""Measures the fit of a quantizer to vectors on a disk beside scikit-learn's MiniBatchKMeans.

    python benchmarks/kmeans.py benchmarks/records/kmeans.json

The vectors are drawn from a mixture with more components than there are centroids and are written once, in float16, to
a temporary folder. Each fit reads them from there, block by block, in a process of its own, whose peak memory is the
kernel's count (VmHWM) and includes the libraries. Both make as many passes over all vectors: ours after it has
converged on a sample, MiniBatchKMeans with `partial_fit` of each block. Ours makes two more, to draw the sample and to
tell its error. The inertia of both is then taken over all vectors. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from common import gib, origin, summary, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.vector_file import VectorFile
from model.kmeans import ResidualKMeans
from model.lloyd import nearest

LIBRARIES = ("torch", "scikit-learn", "numpy")
OURS, PEER = CONTESTANTS = ("ours", "MiniBatchKMeans")
BLOCK = 16_384
"""Vectors read at a time, and the mini-batch of the peer."""
COMPONENTS = 4_096
RANK = 64
"""Dimensions in which the components differ and mostly vary, as features of an encoder do."""
AIMS = {"peak_memory_gib": 1.5, "inertia_ratio": 1.02}
"""At most so much memory for ours, and so many times the inertia of the peer."""


def main() -> None:
    arguments = parse()
    if arguments.contestant:
        json.dump(fit(arguments), sys.stdout)
        return
    console = Console(width=120)
    record = origin(LIBRARIES)
    skipped = ("record", "folder", "contestant", "centroids")
    record["settings"] = {name: value for name, value in vars(arguments).items() if name not in skipped}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = Path(folder)
        started = time.perf_counter()
        make(arguments)
        record["bytes"] = vectors_path(arguments).stat().st_size
        record["making_seconds"] = round(time.perf_counter() - started, 1)
        for number in range(arguments.rounds):
            for name in CONTESTANTS if number % 2 == 0 else CONTESTANTS[::-1]:
                runs[name].append(started_apart(name, arguments))
                console.print(f"{name}: {runs[name][-1]}", highlight=False)
        centroids = {name: torch.load(centroids_path(name, arguments), weights_only=True) for name in CONTESTANTS}
        inertia = measured(centroids, arguments)
    results = {name: result(runs[name], inertia[name], arguments.vectors) for name in CONTESTANTS}
    record |= {
        "results": results,
        "inertia_ratio": round(results[OURS]["inertia"] / results[PEER]["inertia"], 4),
        "time_ratio": round(results[OURS]["fit"]["median"] / results[PEER]["fit"]["median"], 3),
        "aims": AIMS,
    }
    console.print(table(record))
    if arguments.record:
        write(arguments.record, record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--vectors", type=int, default=5_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--centroids", dest="codebook_size", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=3, help="over all vectors")
    parser.add_argument("--rounds", type=int, default=1, help="fits of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the vectors are written; a temporary one when not given")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(arguments: argparse.Namespace) -> None:
    """Writes the vectors."""
    generator = torch.Generator().manual_seed(arguments.seed)
    basis = torch.randn(RANK, arguments.dim, generator=generator) / RANK**0.5
    centres = torch.randn(COMPONENTS, RANK, generator=generator)
    with vectors_path(arguments).open("wb") as file:
        vectors = VectorFile(file, arguments.dim, torch.float16)
        for size in sizes(arguments):
            # Some components are frequent and some are rare.
            which = (COMPONENTS * torch.rand(size, generator=generator).square()).long()
            inside = centres[which] + 0.5 * torch.randn(size, RANK, generator=generator)
            vectors.append(inside @ basis + 0.2 * torch.randn(size, arguments.dim, generator=generator))


def fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """One fit, in a process that does nothing else."""
    fitted = ours if arguments.contestant == OURS else peer
    with vectors_path(arguments).open("rb") as file:
        before = peak_memory()
        started = time.perf_counter()
        centroids = fitted(opened(file, arguments), arguments)
        seconds = time.perf_counter() - started
    torch.save(centroids, centroids_path(arguments.contestant, arguments))
    return {"seconds": round(seconds, 2), "memory_before": before, "peak_memory": peak_memory()}


def ours(vectors: VectorFile, arguments: argparse.Namespace) -> Tensor:
    kmeans = ResidualKMeans(1, arguments.codebook_size, arguments.dim)
    kmeans.fit(vectors, iterations=arguments.passes, seed=arguments.seed)
    return kmeans.centroids[0]


def peer(vectors: VectorFile, arguments: argparse.Namespace) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans  # only here: its memory is not ours

    kmeans = MiniBatchKMeans(arguments.codebook_size, batch_size=BLOCK, n_init=1, random_state=arguments.seed)
    for _ in range(arguments.passes):
        for index in range(len(vectors)):
            kmeans.partial_fit(vectors[index].numpy())
    return torch.from_numpy(kmeans.cluster_centers_)


def measured(centroids: dict[str, Tensor], arguments: argparse.Namespace) -> dict[str, float]:
    """The sum of squared distances of all vectors to the nearest of each contestant's centroids."""
    totals = dict.fromkeys(centroids, 0.0)
    with vectors_path(arguments).open("rb") as file:
        vectors = opened(file, arguments)
        for index in range(len(vectors)):
            block = vectors[index]
            for name, some in centroids.items():
                totals[name] += float(nearest(block, some)[1].sum(dtype=torch.float64))
    return totals


def started_apart(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `fit` says in a process of its own."""
    names = ("vectors", "dim", "passes", "seed", "folder")
    given = [f"--{option}={getattr(arguments, option)}" for option in names]
    command = [sys.executable, __file__, *given, f"--centroids={arguments.codebook_size}", f"--contestant={name}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def peak_memory() -> int:
    """Bytes that this process held at most. What getrusage says would count the process that started it, too."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def opened(file: BinaryIO, arguments: argparse.Namespace) -> VectorFile:
    return VectorFile(file, arguments.dim, torch.float16, sizes(arguments))


def sizes(arguments: argparse.Namespace) -> list[int]:
    """Vectors of each block."""
    whole, rest = divmod(arguments.vectors, BLOCK)
    return [BLOCK] * whole + [rest] * (rest > 0)


def vectors_path(arguments: argparse.Namespace) -> Path:
    return arguments.folder / "vectors"


def centroids_path(name: str, arguments: argparse.Namespace) -> Path:
    return arguments.folder / f"{name}.pt"


def result(runs: list[dict[str, Any]], inertia: float, vectors: int) -> dict[str, Any]:
    return {
        "fit": summary([run["seconds"] for run in runs]),
        "peak_memory_gib": gib(max(run["peak_memory"] for run in runs)),
        "memory_before_gib": gib(max(run["memory_before"] for run in runs)),
        "inertia": inertia,
        "inertia_per_vector": round(inertia / vectors, 4),
    }


def table(record: dict[str, Any]) -> Table:
    settings = record["settings"]
    title = f"{settings['vectors']:,} × {settings['dim']} vectors, {settings['codebook_size']} centroids"
    made = Table(title=f"{title}, {gib(record['bytes'])} GiB on the disk", title_justify="left")
    made.add_column("")
    for heading in ("seconds", "peak memory, GiB", "inertia a vector"):
        made.add_column(heading, justify="right")
    for name, row in record["results"].items():
        made.add_row(name, f"{row['fit']['median']:.1f}", f"{row['peak_memory_gib']}", f"{row['inertia_per_vector']}")
    memory, ratio = record["results"][OURS]["peak_memory_gib"], record["inertia_ratio"]
    met = ["met" if value <= AIMS[aim] else "not met" for aim, value in zip(AIMS, (memory, ratio), strict=True)]
    made.add_section()
    made.add_row("aim of ours", "", f"{AIMS['peak_memory_gib']}: {met[0]}", f"{AIMS['inertia_ratio']} times: {met[1]}")
    made.add_row("ours / peer", f"{record['time_ratio']:.2f}", "", f"{ratio:.4f}")
    return made


if __name__ == "__main__":
    main()
