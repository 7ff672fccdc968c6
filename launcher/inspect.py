"""`stretto inspect`: what a file or folder of ours holds, and whether it is whole. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.progress import Progress
from launcher import inspect_tokens
from launcher.figures import quantizer_figures
from launcher.recipe import RECIPE
from launcher.status import ORDER, TRAINED
from launcher.units import counted, duration, short, size
from model import artifact
from model.errors import UserError
from trainer.metrics_reader import METRICS, curve, read_metrics

SHARD_INDEX = "index.json"
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; the format allows no more."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a manifest that say nothing."""
NUMBERS = {"bytes", "samples", "vectors", "left 1", "left all", "used", "perplexity"}
"""Columns of a listing that are aligned on the right."""
ROWS = 40
"""Rows shown of a long list."""


@dataclass(frozen=True)
class Listing:
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""


@dataclass
class Inspection:
    """What a path holds; `facts` are lines of name and value."""

    path: Path
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    listings: list[Listing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parts: list[Inspection] = field(default_factory=list)

    def all_problems(self) -> Iterator[str]:
        yield from self.problems
        for part in self.parts:
            yield from part.all_problems()


def inspect(path: Path, progress: Progress | None = None) -> Inspection:
    """Looks at one artifact, checkpoint, bundle, shard folder, run folder, safetensors file or metrics.jsonl.

    Every file that a manifest lists is read and its digest compared. Raises UserError where `path` is none of these.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.name == METRICS:
            return _metrics(path)
    elif (path / artifact.MANIFEST).is_file():
        return _artifact(path, progress)
    elif (path / SHARD_INDEX).is_file():
        return _shards(path)
    elif (path / RECIPE).is_file():
        return _run(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist.")
    elif path.name.endswith(artifact.PARTIAL):
        raise UserError(f"{path} was left by something that did not finish; it may be removed.")
    raise UserError(
        f"{path} is nothing Stretto made: it knows run folders, artifacts, checkpoints, bundles, shard folders, "
        "safetensors files and metrics.jsonl."
    )


def print_inspection(path: Path, console: Console, progress: Progress | None = None) -> bool:
    """Shows what `path` holds; returns whether it is whole."""
    found = inspect(path, progress)
    _print(found, console)
    problems = list(found.all_problems())
    for problem in problems:
        console.print(f"[red]damaged:[/] {escape(problem)}", highlight=False)
    if not problems:
        console.print("[green]whole[/]: everything is there as it was written.", highlight=False)
    return not problems


def _print(found: Inspection, console: Console) -> None:
    console.print(f"[bold]{escape(str(found.path))}[/]: {found.kind}", highlight=False)
    for name, value in found.facts.items():
        console.print(f"  {name}: {escape(value)}", highlight=False)
    for listing in found.listings:
        table = Table(title=listing.title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in listing.columns:
            justify: Literal["left", "right"] = "right" if column in NUMBERS else "left"
            table.add_column(column, justify=justify, no_wrap=column == "histogram")
        for row in listing.rows[:ROWS]:
            table.add_row(*(escape(cell) for cell in row))
        if len(listing.rows) > ROWS:
            table.add_row(f"… and {len(listing.rows) - ROWS} more")
        console.print(table)
    for part in found.parts:
        _print(part, console)


def _artifact(path: Path, progress: Progress | None) -> Inspection:
    found = artifact.read(path)
    info, files = found.info, found.manifest["files"]
    kind = {"stage": "trained stage", "checkpoint": "checkpoint", "bundle": "bundle"}.get(found.kind, found.kind)
    inspection = Inspection(path, f"{kind}, format version {found.manifest['format_version']}")
    total = sum(file["bytes"] for file in files.values())
    inspection.facts = {"fingerprint": found.fingerprint, "files": f"{len(files):,}, {size(total)}"}
    if found.manifest["inputs"]:
        made_from = (f"{name} {fingerprint}" for name, fingerprint in found.manifest["inputs"].items())
        inspection.facts["made from"] = ", ".join(made_from)
    if found.kind == "quantizers":
        inspection.listings += [listing for listing in (_quantizers(info),) if listing.rows]  # none were measured
        info = {name: {key: part[key] for key in part if key != "measured"} for name, part in info.items()}
    apart = ("fields", "sources")  # a table of its own; digests, for programs
    inspection.facts |= {key: _plain(value) for key, value in info.items() if key not in apart and value not in EMPTY}
    if "fields" in info:
        inspection.listings.append(_fields(info["fields"].values()))
    inspection.problems = artifact.problems(found)
    damaged = _named(inspection.problems, path, files)
    for name in files:
        if name not in damaged:
            if found.kind == "tokens" and Path(name).name == SHARD_INDEX:
                inspection.parts.append(_token_shards(found, (path / name).parent, damaged, progress))
            elif name.endswith(".safetensors"):
                inspection.parts.append(_safetensors(path / name))
    if not inspection.parts:
        rows = [(name, size(file["bytes"])) for name, file in files.items()]
        inspection.listings.append(Listing(("file", "bytes"), rows))
    return inspection


def _token_shards(tokens: artifact.Artifact, path: Path, damaged: set[str], progress: Progress | None) -> Inspection:
    """One split of a token artifact: its shards and, where none is known to be damaged, its codes."""
    inspection = _shards(path, tokens.info.get("remote"))
    if not any(name.startswith(f"{path.name}/") for name in damaged):
        found = inspect_tokens.statistics(tokens, path.name, progress)
        inspection.facts |= inspect_tokens.facts(tokens, path.name, found)
        inspection.problems += inspect_tokens.problems(tokens, path.name, found)
        inspection.listings.append(Listing(inspect_tokens.COLUMNS, list(inspect_tokens.rows(found)), "Codes"))
    return inspection


def _named(problems: list[str], folder: Path, files: Iterable[str]) -> set[str]:
    """The files that `problems` speak of: they need not read as what they are."""
    return {name for name in files if any(problem.startswith(f"{folder / name} ") for problem in problems)}


def _fields(fields: Iterable[dict[str, Any]]) -> Listing:
    rows = [
        (part["name"], f"{part['rate_hz']:g} Hz", f"{part['quantizers']} × {part['codebook_size']}") for part in fields
    ]
    return Listing(("field", "rate", "quantizers × codes"), rows, "Token fields")


def _quantizers(info: dict[str, Any]) -> Listing:
    """How well fitted quantizers do, as the report has it."""
    columns = ("measured on", "vectors", "left 1", "left all", "used", "perplexity")
    rows = [
        (
            f"{row['quantizer']} {row['kind']} {row['split']}",
            f"{row['vectors']:,}",
            f"{row['variance_left'][0]:.1%}",
            f"{row['variance_left'][-1]:.1%}",
            f"{mean(row['usage']):.0%}",
            f"{mean(row['perplexity']):.1f}",
        )
        for row in quantizer_figures(info)
    ]
    return Listing(columns, rows, "Variance left by level 1 and by all, codes used, perplexity (means of levels)")


def _plain(value: Any) -> str:
    """A value of a manifest in one line, long lists cut."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        more = [f"… {len(value) - 8} more"] if len(value) > 8 else []
        return "; ".join([*(_plain(item) for item in value[:8]), *more])
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: `{tensor: {"dtype", "shape", "data_offsets"}}`, and where its data starts under
    "__start__". Raises UserError where it does not read as one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {**header, "__start__": 8 + length}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise UserError(f"{path} is damaged: it does not read as safetensors.") from None


def _safetensors(path: Path) -> Inspection:
    header = read_header(path)
    start = header.pop("__start__")
    rows, parameters, end = [], 0, 0
    for name, tensor in header.items():
        first, last = tensor["data_offsets"]
        parameters += math.prod(tensor["shape"])
        end = max(end, last)
        rows.append((name, tensor["dtype"], " × ".join(map(str, tensor["shape"])) or "–", size(last - first)))
    inspection = Inspection(path, f"{counted(len(rows), 'tensor')}, {short(parameters)} numbers, {size(end)}")
    inspection.listings.append(Listing(("tensor", "type", "shape", "bytes"), rows))
    if path.stat().st_size != start + end:
        inspection.problems.append(f"{path} has {path.stat().st_size} bytes, {start + end} expected")
    return inspection


def _shards(path: Path, remote: str | None = None) -> Inspection:
    """A folder of MDS shards, or of their index alone where they lie at a `remote`; streaming itself is not asked, so
    that a damaged one can be looked at."""
    try:
        shards = json.loads((path / SHARD_INDEX).read_text())["shards"]
        rows, problems, columns = [], [], []
        for shard in shards:
            data = shard["zip_data"] or shard["raw_data"]
            file = path / data["basename"]
            rows.append((data["basename"], f"{shard['samples']:,}", size(data["bytes"])))
            columns = list(zip(shard["column_names"], shard["column_encodings"], strict=True))
            if remote:
                continue
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif file.stat().st_size != data["bytes"]:
                problems.append(f"{file} has {file.stat().st_size} bytes, {data['bytes']} expected")
        samples = sum(shard["samples"] for shard in shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path / SHARD_INDEX} is damaged: it does not read as an index of MDS shards.") from None
    inspection = Inspection(
        path, f"{counted(samples, 'sample')} in {counted(len(shards), 'MDS shard')}", problems=problems
    )
    if columns:
        inspection.facts["columns"] = ", ".join(f"{name} ({encoding})" for name, encoding in columns)
    inspection.listings.append(Listing(("shard", "samples", "bytes"), rows))
    return inspection


def _metrics(path: Path) -> Inspection:
    inspection = Inspection(path, "metrics of a trained stage")
    try:
        rows = read_metrics(path)
    except ValueError as error:
        inspection.problems.append(f"{path}: {error}")
        return inspection
    for kind in ("train", "validation"):
        chosen = curve(rows, kind)
        if chosen:
            first, last = chosen[0], chosen[-1]
            inspection.facts[kind] = (
                f"{len(chosen):,} rows, steps {first['step']:,} to {last['step']:,}, "
                f"loss {first['loss']:.3f} to {last['loss']:.3f}, over {duration(last['time'] - first['time'])}"
            )
    if not rows:
        inspection.facts["rows"] = "none yet"
    if not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        inspection.facts["last line"] = "being written, or cut when its writer died; it is not read"
    return inspection


def _run(path: Path) -> Inspection:
    """A run folder: each artifact in one line, and every checkpoint."""
    inspection = Inspection(path, "run folder (its stages: `stretto status`)")
    rows = []
    for folder in _run_folders(path):
        name = folder.relative_to(path).as_posix()
        if not (folder / artifact.MANIFEST).is_file():
            rows.append((name, "not finished", "", ""))
            continue
        try:
            found = artifact.read(folder)
        except UserError as error:
            inspection.problems.append(str(error))
            rows.append((name, "", "", "damaged"))
            continue
        wrong = artifact.problems(found)
        inspection.problems += wrong
        total = sum(file["bytes"] for file in found.manifest["files"].values())
        rows.append((name, found.fingerprint, size(total), "damaged" if wrong else "whole"))
    inspection.listings.append(Listing(("artifact", "fingerprint", "bytes", "state"), rows))
    return inspection


def _run_folders(path: Path) -> Iterator[Path]:
    for name in ORDER:
        if (path / name).is_dir():
            yield path / name
        if name in TRAINED:
            yield from sorted((path / name / "checkpoints").glob("step-*"))
