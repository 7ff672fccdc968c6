"""The README of a bundle: what it is, how to use it, what it was trained on, and the licences of its encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.config import STAGES
from model.encoders.pretrained import DEFAULT_WEIGHTS, HUB_ID, SECTIONS

FRONT_MATTER = """---
library_name: stretto
pipeline_tag: text-to-audio
tags:
- music
- text-to-music
- musiclm
# license: yours to choose; look at the data and the encoders first
---
"""
LICENCES = (
    ("encodec_32khz", "CC BY-NC 4.0, as AudioCraft's other weights: not for commercial use"),
    ("encodec", "the library is under the MIT licence; whether that covers the weights is not said there"),
    ("MERT", "CC BY-NC 4.0 by its page on the hub: not for commercial use"),
    ("hubert-base-ls960", "Apache 2.0 by its page on the hub"),
    ("clap-htsat", "Apache 2.0 by its page on the hub"),
    ("music_audioset_epoch", "CC0 1.0 by the hub page of lukewys/laion_clap"),
    ("music_speech", "CC0 1.0 by the hub page of lukewys/laion_clap"),
    ("630k-", "CC0 1.0 by the hub page of lukewys/laion_clap"),
)
"""Part of the name of pretrained weights, and the licence found for them."""
UNKNOWN = "licence not known here: look where the weights come from"
OWN = "built in, without weights of others"


def model_card(info: Mapping[str, Any]) -> str:
    """The text, of what a bundle's manifest says."""
    lines = [
        FRONT_MATTER,
        f"# A music model made by Stretto from the recipe `{info['recipe']}`",
        "",
        *_use(info["captions"]),
        "",
        "## Training",
        "",
        *_data(info["data"], info["captions"]),
        "",
        "| stage | parameters | steps | window | training loss | validation loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_stage(name, info) for name in STAGES),
        "",
        "Losses are in nats a token, at the end of training.",
        "",
        "## Weights",
        "",
        *_weights(info),
        "",
        "## Sampling",
        "",
        *_sampling(info["sampling"]),
        "",
        "## Encoders and licences",
        "",
        *_encoders(info),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in info["versions"].items()) + ". Everything else is in",
        "`manifest.json`. The weights are safetensors; nothing in this folder is executable.",
        "",
    ]
    return "\n".join(lines)


def _use(captions: bool) -> Iterator[str]:
    if captions:
        yield "It was trained with captions and follows prompts worded like them."
        command, call = '"a slow flute melody with drums"', '["a slow flute melody with drums"]'
    else:
        yield "It was trained without captions: it does not follow words, only the manner of a recording."
        command, call = "--like recording.wav", "like=waves"
    yield from ("", f"    stretto generate . {command} -o out.wav --seconds 10", "", "or in Python:", "")
    yield "    from model import MusicPipeline"
    yield ""
    yield f'    music = MusicPipeline.load(".").generate({call}, seconds=10)'
    yield "    music.waveform, music.sample_rate"


def _data(data: Mapping[str, Any], captions: bool) -> Iterator[str]:
    clips, tokens = data["clips"], data["tokens"]
    yield (
        f"Corpus: {data['corpus']}; {clips['train']:,} clips to train on and {clips['validation']:,} to validate, "
        f"{data['hours']:,.1f} hours in all, with{'' if captions else 'out'} captions."
    )
    yield "Tokens: " + ", ".join(f"{count:,} {name}" for name, count in tokens.items()) + "."


def _stage(name: str, info: Mapping[str, Any]) -> str:
    training = info["training"][name]
    losses = ("–" if loss is None else f"{loss:.3f}" for loss in (training["train_loss"], training["validation_loss"]))
    return (
        f"| {name} | {training['parameters']:,} | {training['steps']:,} | {info['stages'][name]['window_seconds']:g} s "
        f"| {' | '.join(losses)} |"
    )


def _weights(info: Mapping[str, Any]) -> Iterator[str]:
    options = info["weights"]
    if options["average"]:
        yield "They are moving averages over the last steps of training."
    elif options["last"] is not None:
        yield f"They are means over the newest {options['last']} checkpoints."
    else:
        yield "They are those of the last step."
    if options["int8"]:
        yield f"Linear layers are in 8 bits, a scale for each output channel; all else is in {options['dtype']}."
    else:
        yield f"They are in {options['dtype']}."
    yield ""
    on = " and ".join(dict.fromkeys(found["on"] for found in info["verified"].values()))
    yield f"Read back and compared on {on} with what they were before they were rounded, if they were:"
    yield from (
        "",
        "| stage | largest difference of a logit | loss before | loss after |",
        "| --- | ---: | ---: | ---: |",
    )
    for name, found in info["verified"].items():
        yield f"| {name} | {found['largest_difference']:.2g} | {found['loss_before']:.4f} | {found['loss_after']:.4f} |"


def _sampling(sampling: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    said = {option: values for option, values in sampling.items() if values}
    if not said:
        yield "Where nothing else is asked for, codes are drawn by the models' own probabilities."
        return
    yield "Where nothing else is asked for:"
    yield ""
    for option, values in said.items():
        yield f"* `{option}`: " + ", ".join(f"{stage} {value:g}" for stage, value in values.items())


def _encoders(info: Mapping[str, Any]) -> Iterator[str]:
    """Each encoder by its kind; a pretrained one by its weights too, with its licence and where to get it."""
    notes = {"codec": info["pretrained"].get("codec"), "joint": info["pretrained"].get("embedding")}
    for part in ("codec", "semantic", "joint"):
        config, note = info["encoders"][part], notes.get(part)
        if config["kind"] not in SECTIONS:
            yield f"* {part}: `{config['kind']}`, {OWN}."
            continue
        name = note["weights"] if note else config["weights"] or DEFAULT_WEIGHTS[config["kind"]]
        line = f"* {part}: `{config['kind']}`, weights `{public_name(name)}` ({licence(name)})."
        if note:
            line += f" They are not in this folder. {note.get('get', '')} Their fingerprint is `{note['digest']}`."
        yield line if part != "semantic" else f"{line} Making music does not need them."


def public_name(weights: str) -> str:
    """The hub id `weights`, or the last part of a path, whose others are nobody's business."""
    return weights if HUB_ID.fullmatch(weights) else Path(weights).name


def licence(weights: str) -> str:
    """What is known of the licence of pretrained `weights`."""
    return next((found for part, found in LICENCES if part in public_name(weights)), UNKNOWN)
