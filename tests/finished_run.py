"""A run folder with all that a bundle is made of, whose three stages were never trained, made in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from small_bundle import ENCODERS, FIELDS, fitted_parts, random_stage, stage_configs

from data.corpus import write_jsonl
from data.shard_writer import write_records
from model import artifact
from model.bundle import QUANTIZERS
from model.config import STAGES, StageModelConfig
from model.fields import CONDITIONING
from trainer import checkpoint_folder
from trainer.config import StageConfig, TrainConfig
from trainer.metrics_reader import METRICS
from trainer.setup import AVERAGE_WEIGHTS, WEIGHTS, StageSetup
from trainer.tensor_files import slice_name, write_tensors
from trainer.weights_kinds import STAGE

STEPS = (2, 4, 6)
"""Of the checkpoints; the last one holds the weights as they were trained."""
RANKS = 2


def make_finished_run(run: Path, average: bool = False) -> Path:
    """Fills the folder `run`. With `average` its stages keep a moving average."""
    torch.manual_seed(0)
    codec, towers, quantizers = fitted_parts()
    for name, model in (("codec", codec), ("embedding", towers)):
        with artifact.create(run / name, name, name) as (folder, _):
            model.save(folder)
    with artifact.create(run / "quantizers", "quantizers", "quantizers") as (folder, _):
        write_tensors(folder / QUANTIZERS, quantizers)
    _tokens(run / "tokens")
    configs = stage_configs()
    stages = {
        name: StageConfig(model=configs[name], train=TrainConfig(steps=STEPS[-1], warmup_steps=1)) for name in STAGES
    }
    recipe = {
        "name": "small",
        "seed": 1,
        "data": {"audio": "/home/somebody/songs"},
        "encoders": ENCODERS.model_dump(mode="json"),
        "sampling": {"temperature": {"semantic": 0.9}, "top_k": {}},
        "stages": {name: stage.model_dump(mode="json") for name, stage in stages.items()},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, config in configs.items():
        make_finished_stage(run, name, config, quantizers, average)
    return run


def _tokens(path: Path) -> None:
    random = np.random.default_rng(0)

    def codes(name: str) -> np.ndarray:
        field = FIELDS[name]
        frames = 1 if name == CONDITIONING else field.frames(2.0)
        return random.integers(field.codebook_size, size=(frames, field.quantizers)).astype(np.uint16)

    records = [
        {"id": f"clip-{number}", "captions": '["a tune"]', "text_conditioning": codes(CONDITIONING)}
        | {name: codes(name) for name in FIELDS}
        for number in range(3)
    ]
    with artifact.create(path, "tokens", "tokens") as (folder, info):
        for split in ("train", "validation"):
            write_records(folder / split, records, [{"seconds": 2.0}] * len(records))
        info.update(
            fields={name: field.to_json() for name, field in FIELDS.items()},
            captions=True,
            clip_seconds=2.0,
            hop_seconds=5.0,
            embedding_seconds=5.0,
            records={"train": 3, "validation": 3},
            seconds=3600.0,
            remote=None,
        )


def make_finished_stage(
    run: Path, name: str, config: StageModelConfig, quantizers: dict[str, torch.Tensor], average: bool = False
) -> None:
    """A stage that the recipe of `run` describes by `config`, with random weights and checkpoints."""
    folder = run / name
    folder.mkdir()
    (folder / "stage.json").write_text(json.dumps({"fingerprint": name}))
    setup = StageSetup.read(run, name)
    for step in STEPS:
        weights = dict(sorted(random_stage(config, quantizers, setup.fields).named_parameters()))
        weights = {key: value.detach() for key, value in weights.items()}
        means = {key: value / 2 for key, value in weights.items()} if average else {}
        save_checkpoint(folder / "checkpoints" / checkpoint_folder.step_name(step), step, setup, weights, means)
    write_tensors(folder / WEIGHTS, weights)
    if average:
        write_tensors(folder / AVERAGE_WEIGHTS, means)
    losses = [{"kind": kind, "step": STEPS[-1], "loss": loss} for kind, loss in (("train", 1.25), ("validation", 1.5))]
    write_jsonl(folder / METRICS, losses)
    parameters = sum(value.numel() for value in weights.values())
    info = {"steps": STEPS[-1], "parameters": parameters, "model": config.model_dump(mode="json")}
    names = [WEIGHTS, AVERAGE_WEIGHTS] if average else [WEIGHTS]
    artifact.write_manifest(folder, STAGE, name, setup.identity, info, names)


def save_checkpoint(
    folder: Path,
    step: int,
    setup: StageSetup,
    weights: dict[str, torch.Tensor],
    means: dict[str, torch.Tensor],
) -> None:
    """As RANKS ranks save it: each a stretch of every parameter."""
    folder.mkdir(parents=True)
    files = {}
    for rank in range(RANKS):
        held = {}
        for kind, tensors in (("weights", weights), ("average", means)):
            for key, value in tensors.items():
                first, last = (value.numel() * number // RANKS for number in (rank, rank + 1))
                held[slice_name(kind, key, first)] = value.flatten()[first:last].clone()
        file = checkpoint_folder.rank_file(rank)
        files[file] = write_tensors(folder / file, held)
    state = {"step": step, "updates": step, "consumed": {"windows": step, "tokens": step}}
    (folder / checkpoint_folder.STATE).write_text(json.dumps(state))
    info = {
        "step": step,
        "world_size": RANKS,
        "shapes": {key: list(value.shape) for key, value in weights.items()},
        "config": setup.config.model_dump(mode="json"),
        "versions": {"deepspeed": "0"},
    }
    files |= artifact.describe_files(folder, [checkpoint_folder.STATE])
    checkpoint_folder.seal(folder, setup.identity, info, files)
