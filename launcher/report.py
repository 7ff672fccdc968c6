"""What a run came to: `report.html`, one file with everything in it, its figures in `report.json`, and a summary."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.figures import collect
from launcher.status import REPORT
from launcher.units import duration, short, size
from model.artifact import write_json

PLAYERS = 12
"""Generated clips that can be played in the report; all are listed."""
REAL_PLAYERS = 4
SPECTROGRAMS = 4
SKIPPED_ROWS = 100
COLUMNS = {
    "generated": "generated",
    "shuffled": "shuffled prompts",
    "chance": "chance",
    "real": "real clips",
    "ceiling": "ceiling",
}
"""Columns of the adherence table; the ceiling is what real clips reach after the codec."""
NO_CAPTIONS = (
    "The corpus has no captions, so the model learnt from audio alone: words mean nothing to it. It makes music in the "
    "manner of a recording. To get prompts that work, add captions (docs/guide.md) and run the same command again."
)
NO_ATTRIBUTES = (
    "It is not known which instrument, register, tempo and drums the clips of this corpus have, so there is nothing to "
    "judge the music by. Listen to it, and look at what shuffled conditions do to the loss."
)
NO_SAMPLES = "The run has made no samples yet."


def write_report(run: Path) -> Path:
    """Writes `report.json` and `report.html` of the run and returns the latter's path.

    Parts of the run that are not there are left out and named. Raises UserError where `run` is not a run folder.
    """
    figures = collect(run)
    write_json(run / "report.json", figures)
    path = run / REPORT
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(render(run, figures), encoding="utf-8")
    partial.replace(path)
    return path


def render(run: Path, figures: dict[str, Any]) -> str:
    """The HTML of the report."""
    from jinja2 import Environment, StrictUndefined  # only here: a status or a plan should not wait for it

    template = (resources.files("launcher") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "short": short, "size": size, "percent": percent, "loss": _loss}
    return environment.from_string(template).render(
        **figures,
        summary=recipe_summary(figures["settings"]),
        columns=adherence_columns(figures),
        no_adherence=no_adherence(figures),
        uncertainty=uncertainty(figures),
        command=generate_command(Path(), figures),
        skipped_rows=SKIPPED_ROWS,
        **media(run, figures),
    )


def adherence_columns(figures: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, label) for name, label in COLUMNS.items() if name in (figures["adherence"] or {})]


def media(run: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Pictures and sounds as data URLs."""
    from launcher import pictures  # matplotlib takes a second to load

    folder = run / "samples"
    samples = [row for row in figures["samples"] if (folder / row["wav"]).is_file()]
    real = [row for row in figures["real"] if (folder / row["wav"]).is_file()]
    pairs = [
        (row["prompt"], folder / row["wav"], title(one), folder / one["wav"]) for row, one in beside(samples, real)
    ]
    return {
        "curves": pictures.loss_curves(figures["stages"]) if figures["stages"] else None,
        "spectrograms": pictures.spectrograms(pairs) if pairs else None,
        "sounds": {row["wav"]: pictures.audio_url(folder / row["wav"]) for row in samples[:PLAYERS]}
        | {row["wav"]: pictures.audio_url(folder / row["wav"]) for row in real[:REAL_PLAYERS]},
    }


def title(real: dict[str, Any]) -> str:
    return real["captions"][0] if real["captions"] else real["id"]


def beside(samples: list[dict[str, Any]], real: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A few generated clips, each with a real one of the same attributes where there is one, else with any other."""
    pairs, left = [], list(real)
    for sample in samples:
        alike = [one for one in left if one["attributes"] and _agrees(one["attributes"], sample["attributes"])]
        if alike:
            left.remove(alike[0])
            pairs.append((sample, alike[0]))
    taken = [sample["wav"] for sample, _ in pairs]
    pairs += zip((sample for sample in samples if sample["wav"] not in taken), left, strict=False)
    return pairs[:SPECTROGRAMS]


def _agrees(attributes: dict[str, str], asked: dict[str, str] | None) -> bool:
    return asked is not None and all(attributes.get(name) == value for name, value in asked.items())


def no_adherence(figures: dict[str, Any]) -> str | None:
    """Why there is no adherence table, and what that means; None where there is one."""
    if figures["captions"] is False:
        return NO_CAPTIONS
    if figures["adherence"]:
        return None
    return NO_ATTRIBUTES if figures["samples"] else NO_SAMPLES


def uncertainty(figures: dict[str, Any]) -> float | None:
    """Largest standard error of one attribute's share over that many prompts."""
    prompts = figures["prompts"]
    return 0.5 / prompts**0.5 if prompts and figures["adherence"] else None


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def recipe_summary(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """The recipe in a few lines of label and text."""
    data, encoders, stages = recipe.get("data", {}), recipe.get("encoders", {}), recipe.get("stages", {})
    lines = []
    if data:
        source = data.get("audio") or f"built-in, {data['clips']:,} clips"
        lines.append(("corpus", f"{source}, clips of {data['clip_seconds']:g} s"))
    if encoders:
        kinds = (f"{part} {encoders[part]['kind']}" for part in ("codec", "semantic", "joint"))
        lines.append(("encoders", ", ".join(kinds)))
    for name, stage in stages.items():
        transformer, train = stage["model"]["transformer"], stage["train"]
        shape = f"{transformer['layers']} layers × {transformer['heads']} heads, width {transformer['dim']}"
        windows = f"{train['global_batch']} windows of {stage['model']['window_seconds']:g} s"
        where = f"{train['ranks']} ranks, {train['zero']}, {train['precision']}"
        lines.append((name, f"{shape}; {train['steps']:,} steps of {windows} on {where}"))
    return lines


def print_summary(run: Path, console: Console) -> None:
    """The end of a run in a few lines: prompt adherence, time, where everything is, how to make music."""
    figures = collect(run)
    reason = no_adherence(figures)
    if figures["adherence"]:
        console.print(_adherence_table(figures))
    if reason:
        console.print(reason, highlight=False)
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in figures["seconds"].items())
    if times:
        console.print(f"Time: {times}; in all {duration(sum(figures['seconds'].values()))}.", highlight=False)
    for stage, field in ignored(figures):
        console.print(f"[yellow]Note:[/] the {stage} stage ignores its {field} condition.", highlight=False)
    for label, place in (("Bundle", "bundle"), ("Music", "samples/wav"), ("Report", REPORT)):
        if (run / place).exists():
            console.print(f"{label + ':':<8}{escape(str(run / place))}", highlight=False, soft_wrap=True)
    if (run / "bundle").is_dir():
        console.print(f"Make music: {escape(generate_command(run, figures))}", highlight=False, soft_wrap=True)


def ignored(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The stages and conditions of theirs whose shuffling hardly raises the loss."""
    return [
        (name, field)
        for name, stage in figures["stages"].items()
        for field, use in stage["conditions"].items()
        if use["ignored"]
    ]


def generate_command(run: Path, figures: dict[str, Any]) -> str:
    """A command that works with this run's bundle."""
    bundle = shlex.quote(str(run / "bundle"))
    if figures["captions"] is False:
        return f"stretto generate {bundle} --like RECORDING -o out.wav"
    prompt = figures["samples"][0]["prompt"] if figures["samples"] else "your words"
    return f"stretto generate {bundle} {shlex.quote(prompt)} -o out.wav"


def _adherence_table(figures: dict[str, Any]) -> Table:
    adherence = figures["adherence"]
    heading = f"Right by the judge, {figures['prompts']} prompts generated once each"
    table = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attribute")
    columns = adherence_columns(figures)
    for _, label in columns:
        table.add_column(label, justify="right")
    table.add_column("of ceiling", justify="right")
    for attribute in adherence["generated"]:
        cells = [percent(adherence[name].get(attribute)) for name, _ in columns]
        table.add_row(attribute, *cells, percent(figures["share_of_ceiling"].get(attribute)))
    return table
