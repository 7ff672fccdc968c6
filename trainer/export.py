"""From a finished run to a bundle: all that is needed to make music, without pickle and without the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from data.progress import Progress
from model import artifact
from model.artifact import Artifact
from model.config import STAGES
from model.errors import UserError
from model.pipeline import CODEC, JOINT, QUANTIZERS
from trainer.setup import AVERAGE_WEIGHTS, KIND, WEIGHTS


def export_bundle(run: Path, folder: Path, progress: Progress, average: bool = False) -> dict[str, Any]:
    """Fills `folder` from the artifacts of `run` and returns what its manifest says of it.

    With `average` the weights are their moving averages. Raises UserError where a part of the run is not finished, or
    a stage keeps no average.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    tokens = artifact.read(run / "tokens", "tokens")
    info: dict[str, Any] = {
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "fields": tokens.info["fields"],
        "captions": tokens.info["captions"],
        "encoders": recipe["encoders"],
        "sampling": recipe["sampling"],
        "average": average,
        "stages": {},
        "training": {},
    }
    for done, name in enumerate(STAGES):
        stage = artifact.read(run / name, KIND)
        shutil.copyfile(_weights(stage, name, average), folder / f"{name}.safetensors")
        info["stages"][name] = stage.info["model"]
        info["training"][name] = {key: stage.info[key] for key in ("steps", "parameters")}
        progress.update(done + 1, len(STAGES) + 1, f"copied {name}")
    shutil.copyfile(artifact.read(run / "quantizers", "quantizers").path / QUANTIZERS, folder / QUANTIZERS)
    for source, target in ((run / "codec", folder / CODEC), (run / "embedding", folder / JOINT)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(artifact.MANIFEST))
    (folder / "README.md").write_text(model_card(info))
    return info


def _weights(stage: Artifact, name: str, average: bool) -> Path:
    if average and AVERAGE_WEIGHTS not in stage.manifest["files"]:
        raise UserError(
            f"stage {name!r} has no average of its weights: train it with stages.{name}.train.ema_decay, such as 0.999."
        )
    return stage.path / (AVERAGE_WEIGHTS if average else WEIGHTS)


def model_card(info: dict[str, Any]) -> str:
    """The bundle's README: what it is, how to use it and what it was trained on."""
    encoders = info["encoders"]
    rows = [
        f"| {name} | {info['training'][name]['parameters']:,} | {info['training'][name]['steps']:,} "
        f"| {info['stages'][name]['window_seconds']:g} s |"
        for name in STAGES
    ]
    if info["captions"]:
        use = 'stretto generate . "a slow flute melody with drums" -o out.wav'
        text = "It was trained with captions and follows prompts worded like them."
    else:
        use = "stretto generate . --like recording.wav -o out.wav"
        text = "It was trained without captions: it does not follow words, only the manner of a recording."
    return "\n".join(
        [
            f"# A music model made by Stretto from the recipe `{info['recipe']}`",
            "",
            text,
            "",
            f"    {use}",
            "",
            "| stage | parameters | training steps | window |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            *(["The weights are moving averages over the last steps of training.", ""] if info["average"] else []),
            f"Encoders: codec `{encoders['codec']['kind']}`, semantic `{encoders['semantic']['kind']}`, "
            f"joint `{encoders['joint']['kind']}`. Everything else is in `manifest.json`. The weights are safetensors "
            "in fp32; nothing in this folder is executable.",
            "",
        ]
    )
