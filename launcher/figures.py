"""Every number of a run's report, gathered from what the run left on the disk. Imports no torch."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from data.corpus import SKIPPED, read_jsonl
from launcher.status import REPORT, TRAINED, read_status
from model import artifact
from model.errors import UserError
from trainer.metrics_reader import METRICS, curve, read_metrics

IGNORED = 0.01
"""A condition whose shuffling raises the loss by less than this share is not listened to."""
CURVE_POINTS = 400
SPEEDS = ("windows_per_second", "tokens_per_second", "mfu", "data_wait", "checkpoint_stall")
"""Figures of a training row of which the report has the median."""
LIBRARIES = ("stretto", "torch", "deepspeed", "mosaicml-streaming", "transformers", "numpy")
PLACES = {
    REPORT: "this report",
    "report.json": "its figures as JSON",
    "bundle": "the model: all that generation needs",
    "samples/wav": "the generated music",
    "recipe.yaml": "the recipe with every key written out",
    "corpus": "the list of clips, prompts and skipped files",
    "tokens": "the token shards",
    **{f"{name}/metrics.jsonl": f"losses and speed of the {name} stage" for name in TRAINED},
    **{f"{name}/tensorboard": f"the same for TensorBoard ({name})" for name in TRAINED},
    "logs": "what every stage printed",
    "previous": "outputs of earlier recipes that were moved aside",
}
"""What stands where in a run folder."""


def collect(run: Path) -> dict[str, Any]:
    """The figures of the run, whatever of it is there; what is not is None or empty.

    Raises UserError where `run` is not a run folder.
    """
    status = read_status(run)
    corpus, quantizers, tokens, samples = (_info(run / name) for name in ("corpus", "quantizers", "tokens", "samples"))
    recipe = read_recipe_values(run)
    adherence = (samples or {}).get("adherence")
    return {
        "format_version": 1,
        "recipe": {"name": status.recipe, "description": recipe.get("description", ""), "seed": recipe.get("seed")},
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "state": status.state,
        "captions": (corpus or tokens or {}).get("captions"),
        "prompts": (samples or {}).get("prompts"),
        "adherence": adherence,
        "share_of_ceiling": share_of_ceiling(adherence) if adherence else None,
        "stages": {name: figures for name in TRAINED if (figures := stage_figures(run, name, tokens))},
        "quantizers": quantizer_figures(quantizers or {}),
        "seconds": {stage.name: stage.seconds for stage in status.stages if stage.seconds},
        "corpus": corpus,
        "skipped": _rows(run / "corpus" / SKIPPED),
        "samples": [{**row, "right": right(row)} for row in _rows(run / "samples" / "samples.jsonl")],
        "real": _rows(run / "samples" / "real.jsonl"),
        "places": {
            place: what for place, what in PLACES.items() if (run / place).exists() or place.startswith("report")
        },
        "settings": recipe,
        "versions": versions(),
        "machine": machine(),
        "missing": [stage.name for stage in status.stages if stage.state != "done"],
    }


def read_recipe_values(run: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))


def _info(folder: Path) -> dict[str, Any] | None:
    try:
        return artifact.read(folder).info
    except UserError:  # not made yet, or damaged: the report tells of the rest
        return None


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def share_of_ceiling(adherence: dict[str, dict[str, float]]) -> dict[str, float]:
    """What music made by the model reaches of what real clips reach through the codec, for each attribute."""
    ceiling = adherence["ceiling"]
    return {name: share / ceiling[name] for name, share in adherence["generated"].items() if ceiling.get(name)}


def right(sample: dict[str, Any]) -> dict[str, bool]:
    """Whether each judged attribute of a sample is the one its prompt asks for."""
    asked, judged = sample.get("attributes") or {}, sample.get("judged") or {}
    return {name: asked[name] == value for name, value in judged.items() if name in asked}


def stage_figures(run: Path, name: str, tokens: dict[str, Any] | None) -> dict[str, Any] | None:
    """Curves and last losses of one trained stage; None where it has not started."""
    rows = read_metrics(run / name / METRICS)
    train, validation = curve(rows, "train"), curve(rows, "validation")
    if not rows:
        return None
    info = _info(run / name) or {}
    field = info.get("model", {}).get("field") or ("semantic" if name == "semantic" else "acoustic")
    codes = tokens["fields"][field]["codebook_size"] if tokens else None
    last = validation[-1] if validation else {}
    first = next((row["loss"] for row in [*validation, *train]), None)
    return {
        "steps": rows[-1]["step"],
        "parameters": info.get("parameters"),
        "codebook_size": codes,
        "ln_codebook": math.log(codes) if codes else None,
        "first_loss": first,
        "first_step": rows[0]["step"],
        "loss": last.get("loss"),
        "quantizers": last.get("quantizers", []),
        "conditions": {field: condition_use(last["loss"], loss) for field, loss in last.get("shuffled", {}).items()},
        "text_loss": last.get("text"),
        **{speed: _median(train, speed) for speed in SPEEDS},
        "skipped_steps": train[-1].get("skipped") if train else None,
        "train": thin([[row["step"], row["loss"]] for row in train]),
        "validation": thin([[row["step"], row["loss"]] for row in validation]),
        "shuffled": {
            field: thin([[row["step"], row["shuffled"][field]] for row in validation if field in row["shuffled"]])
            for field in last.get("shuffled", {})
        },
    }


def quantizer_figures(info: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each quantizer, kind of vector and split it was measured on; what it did is listed level by level."""
    return [
        {"quantizer": name, "kind": kind, "split": split, "codebook_size": quantizer["codebook_size"], **measured}
        for name, quantizer in info.items()
        for kind, splits in quantizer.get("measured", {}).items()
        for split, measured in splits.items()
    ]


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    """Of a figure over the rows that have it; None where none has."""
    values = [row[name] for row in rows if name in row]
    return median(values) if values else None


def condition_use(loss: float, shuffled: float) -> dict[str, Any]:
    """How much a stage loses when one of its conditions is taken from other windows."""
    rise = (shuffled - loss) / loss if loss else 0.0
    return {"shuffled_loss": shuffled, "rise": rise, "ignored": rise < IGNORED}


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most CURVE_POINTS of `points`, evenly spaced, with the last."""
    step = -(-len(points) // CURVE_POINTS) or 1
    return points[:-1][::step] + points[-1:]


def versions() -> dict[str, str]:
    """Python and the libraries that shape a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What this machine is: processor, cores, memory in bytes, GPUs, system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, from the driver: asking CUDA would take its start-up time."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    lines = [line.partition(":") for text in texts for line in text.splitlines()]
    return [value.strip() for name, _, value in lines if name == "Model"]
