"""From a finished run to a bundle: all that is needed to make music, without pickle and without the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from data.progress import Progress
from model import artifact
from model.artifact import Artifact
from model.bundle import CODEC, JOINT, QUANTIZERS, load_stage, read_tensors, stage_file
from model.config import STAGES
from model.encoders.pretrained import NOTE
from model.errors import UserError
from model.fields import TokenField
from model.int8 import is_linear, quantised
from model.pipeline import DTYPES, ready
from trainer.export_check import compare, example_windows, logits_of
from trainer.metrics_reader import METRICS, last_metrics
from trainer.model_card import model_card
from trainer.setup import StageSetup
from trainer.stage_weights import StageWeights, read_weights
from trainer.tensor_files import write_tensors

PARTS = {"codec": CODEC, "embedding": JOINT}
"""The artifacts with encoders, and where they go in a bundle."""
SPARE_BYTES = 1 << 20
"""For headers, the manifest and the card."""


@dataclass(frozen=True)
class ExportOptions:
    """Which weights leave the run, and in how many bits."""

    dtype: str = "fp32"
    """fp32, bf16 or fp16."""
    int8: bool = False
    """Linear layers of the transformers in 8 bits, all else in `dtype`."""
    average: bool = False
    """The moving average of the weights, not the last ones."""
    last: int | None = None
    """The mean of the weights in so many of the newest checkpoints."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}: it must be {', '.join(DTYPES)}.")
        if self.last is not None and self.last < 1:
            raise UserError(f"last is {self.last}: it must be a whole number that is 1 or more.")
        if self.average and self.last is not None:
            raise UserError("average and last cannot go together: they are two ways of averaging. Choose one.")

    @property
    def rounding(self) -> str:
        """The fewest bits that a weight has."""
        return "int8" if self.int8 else self.dtype

    @property
    def changes(self) -> dict[str, Any]:
        """What is not as in the bundle of a run."""
        plain = asdict(ExportOptions())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


def export_bundle(run: Path, folder: Path, progress: Progress, options: ExportOptions | None = None) -> dict[str, Any]:
    """Fills `folder` from the artifacts of `run` and returns what its manifest says of it.

    Every stage is read back from `folder` and its logits compared with those of the stage as it was trained. Raises
    UserError where a part of the run is not finished or not what its manifest says, where weights are to be averaged
    that are not there, or where the disk has no room; RuntimeError where a stage computes something else.
    """
    options = options or ExportOptions()
    parts = {name: _whole(artifact.read(run / name, name)) for name in (*PARTS, "quantizers")}
    weights: dict[str, StageWeights] = {name: read_weights(run, name, options.average, options.last) for name in STAGES}
    _check_room(folder, parts, weights, options)
    info = _describe(run, parts, weights, options)
    shutil.copyfile(parts["quantizers"].path / QUANTIZERS, folder / QUANTIZERS)
    for name, target in PARTS.items():
        shutil.copytree(parts[name].path, folder / target, ignore=shutil.ignore_patterns(artifact.MANIFEST))
    for done, (name, source) in enumerate(weights.items()):
        progress.update(done, len(weights), f"writing {name}")
        write_tensors(folder / stage_file(name), dict(sorted(_stored(name, source, options))))
        info["verified"][name] = _verify(run, folder, info, name, source, options.rounding)
    progress.update(len(weights), len(weights), "written and compared")
    (folder / artifact.CARD).write_text(model_card(info), encoding="utf-8")
    artifact.sync(folder / artifact.CARD)
    return info


def _whole(found: Artifact) -> Artifact:
    wrong = artifact.problems(found)
    if wrong:
        raise UserError(f"{wrong[0]}. Bring back a copy of it, or make that stage of the run again.")
    return found


def _check_room(
    folder: Path, parts: Mapping[str, Artifact], weights: Mapping[str, StageWeights], options: ExportOptions
) -> None:
    """Raises UserError where the disk of `folder` has not as much room as the bundle takes."""
    copied = sum(file["bytes"] for part in parts.values() for file in part.manifest["files"].values())
    written = sum(_bytes(key, shape, options) for source in weights.values() for key, shape in source.shapes.items())
    artifact.require_room(folder, copied + written + SPARE_BYTES)


def _bytes(key: str, shape: tuple[int, ...], options: ExportOptions) -> int:
    count = torch.Size(shape).numel()
    if options.int8 and is_linear(key, shape):
        return count + 4 * shape[0]
    return count * DTYPES[options.dtype].itemsize


def _stored(name: str, source: StageWeights, options: ExportOptions) -> Iterator[tuple[str, Tensor]]:
    """The tensors of stage `name`'s file."""
    for key, shape in source.shapes.items():
        value = source.read(key)
        if options.int8 and is_linear(key, shape):
            yield from quantised(key, value)
            continue
        stored = value.to(DTYPES[options.dtype])
        if not stored.isfinite().all():
            remedy = "Export it in bf16." if value.isfinite().all() else "Its training diverged."
            raise UserError(f"{key} of stage {name!r} has values that {options.dtype} cannot hold. {remedy}")
        yield key, stored


def _verify(
    run: Path, folder: Path, info: dict[str, Any], name: str, source: StageWeights, rounding: str
) -> dict[str, Any]:
    """Reads stage `name` back as MusicPipeline does and compares its logits with those that the trainer's own model has
    with the weights of `source`. Returns what the manifest says of it."""
    setup = StageSetup.read(run, name)
    origin, windows = example_windows(setup)
    trained = setup.build_model()
    trained.load_state_dict({key: source.read(key) for key in source.shapes})
    expected = logits_of(trained, windows)
    del trained  # one model at a time
    exported = load_stage(folder, info, name, read_tensors(folder / QUANTIZERS))
    exported = ready(exported, torch.device("cpu"), torch.float32)
    return {"on": origin, **compare(name, exported, windows, expected, rounding)}


def _describe(
    run: Path, parts: Mapping[str, Artifact], weights: Mapping[str, StageWeights], options: ExportOptions
) -> dict[str, Any]:
    """What the manifest says, but for what is found when the stages are compared."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    tokens = artifact.read(run / "tokens", "tokens").info
    notes = {name: part.path / NOTE for name, part in parts.items() if NOTE in part.manifest["files"]}
    sources = {name: source.stage for name, source in weights.items()} | dict(parts)
    return {
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "fields": tokens["fields"],
        "captions": tokens["captions"],
        "encoders": recipe["encoders"],
        "pretrained": {name: yaml.safe_load(note.read_text()) for name, note in notes.items()},
        "sampling": recipe["sampling"],
        "weights": asdict(options),
        "stages": {name: source.stage.info["model"] for name, source in weights.items()},
        "training": {name: _training(run, name, source.stage.info) for name, source in weights.items()},
        "data": _data(recipe, tokens),
        "sources": {
            name: {
                "fingerprint": found.fingerprint,
                "files": weights[name].digests if name in weights else _digests(found),
            }
            for name, found in sources.items()
        },
        "verified": {},
        "versions": {name: metadata.version(name) for name in ("stretto", "torch", "safetensors")},
    }


def _digests(found: Artifact) -> dict[str, str]:
    return {name: file["sha256"] for name, file in found.manifest["files"].items()}


def _training(run: Path, name: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """How long a stage was trained and where its losses ended; None where the run no longer says."""
    losses = {kind: (last_metrics(run / name / METRICS, kind) or {}).get("loss") for kind in ("train", "validation")}
    return {
        "steps": info["steps"],
        "parameters": info["parameters"],
        **{f"{kind}_loss": losses[kind] for kind in losses},
    }


def _data(recipe: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, Any]:
    """What the models were trained on. Of the user's folders only the last name: the bundle may be published."""
    audio = recipe.get("data", {}).get("audio")
    fields = [TokenField.from_json(value) for value in tokens["fields"].values()]
    return {
        "corpus": Path(audio).name if audio else "built-in, synthesised",
        "clips": tokens["records"],
        "hours": tokens["seconds"] / 3600,
        "tokens": {field.name: round(tokens["seconds"] * field.rate_hz * field.quantizers) for field in fields},
    }
