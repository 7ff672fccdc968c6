"""Run folders that are ready to train a tiny stage, and what its training leaves."""

from __future__ import annotations

import multiprocessing
import shutil

import numpy as np
import torch
import yaml
from helpers import FIELDS, coarse_config, quantizers
from safetensors.torch import save_file

from data.processes import plain_errors
from data.shard_writer import write_records
from model import artifact
from trainer.checkpoint_folder import step_name
from trainer.config import StageConfig, TrainConfig
from trainer.metrics_reader import read_metrics
from trainer.tensor_files import SlicedTensors

SECONDS = 4.0
STEPS = 60


def record(index: int, seconds: float = SECONDS) -> dict:
    """A clip whose acoustic codes follow from its semantic codes, and those from its conditioning."""
    random = np.random.default_rng(index)
    conditioning = random.integers(4, size=(1, 4))
    semantic = (np.arange(round(seconds * 10)) + conditioning[0, 0]) % 8
    acoustic = np.repeat(semantic, 2)[:, None] + np.arange(4)
    return {
        "id": f"clip-{index}",
        "captions": '["a tune"]',
        "conditioning": conditioning.astype(np.uint16),
        "semantic": semantic[:, None].astype(np.uint16),
        "acoustic": acoustic.astype(np.uint16),
        "text_conditioning": conditioning.astype(np.uint16),
    }


SCHEDULE = {
    "steps": STEPS,
    "global_batch": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 4,
    "log_every": 6,
    "validate_every": 30,
    "checkpoint_every": 16,
}


TINY = {"steps": 12, "warmup_steps": 2, "log_every": 1, "validate_every": 99, "checkpoint_every": 2}
"""What `make_run` takes for a training of a few steps with many checkpoints."""


def make_run(folder, model=None, lengths=(SECONDS,), **train):
    """A run folder that is ready to train its coarse stage, with the keys `model` and `train` changed, on clips that go
    round `lengths` (seconds)."""
    config = StageConfig(
        model=coarse_config(pattern="delay", **(model or {})), train=TrainConfig(**{**SCHEDULE, **train})
    )
    recipe = {"name": "test", "seed": 1, "stages": {"coarse": config.model_dump(mode="json")}}
    (folder / "coarse").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "coarse" / "stage.json").write_text('{"fingerprint": "0123456789abcdef"}')
    with artifact.create(folder / "quantizers", "quantizers", "q") as (path, _):
        save_file(quantizers(), path / "quantizers.safetensors")
    with artifact.create(folder / "tokens", "tokens", "t") as (path, info):
        for split, first, count in (("train", 0, 50), ("validation", 100, 10)):
            numbers = range(first, first + count)
            write_records(path / split, (record(index, lengths[index % len(lengths)]) for index in numbers))
        info |= {
            "fields": {name: field.to_json() for name, field in FIELDS.items()},
            "clip_seconds": SECONDS,
            "hop_seconds": 5.0,
            "embedding_seconds": 5.0,
            "captions": True,
            "records": {"train": 50, "validation": 10},
            "seconds": 60 * SECONDS,
        }
    return folder


def job(run, *callbacks):
    """A rank as `deepspeed --module trainer` starts it, with more callbacks."""
    from trainer.__main__ import train

    if callbacks:
        import trainer.training

        usual = trainer.training.callbacks
        trainer.training.callbacks = lambda setup, engine: [*usual(setup, engine), *callbacks]
    with plain_errors(run):
        return train(run, "coarse")


def change(run, **train):
    """Changes keys of `train` in the recipe of a run folder."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"]["coarse"]["train"].update(train)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def log_of(run, rank=0):
    return (run / "coarse" / "logs" / f"rank-{rank:04d}.log").read_text()


def checkpoints(run):
    return run / "coarse" / "checkpoints"


def weights_digest(run):
    return artifact.file_digest(run / "coarse" / "model.safetensors")


def rows(run, kind):
    return [row for row in read_metrics(run / "coarse" / "metrics.jsonl") if row["kind"] == kind]


def checkpoint(run, step):
    return checkpoints(run) / step_name(step)


def holdings(folder):
    """Every tensor of a checkpoint whole: {(kind, name): values}."""
    paths = sorted(folder.glob("rank-*.safetensors"))
    tensors = SlicedTensors(paths)
    whole = {}
    for (kind, name), slices in tensors._slices.items():
        if kind != "random":
            whole[kind, name] = torch.empty(max(first + count for first, count, *_ in slices))
            tensors.read(kind, name, 0, whole[kind, name])
    return whole


def train_all(*runs):
    """For `run_ranks`: trains in each of the folders, one after another. None leaves a loader's process behind."""
    from trainer.engine import Engine, start_process_group
    from trainer.setup import SWAP, StageSetup
    from trainer.training import Training

    start_process_group()
    for run in runs:
        setup = StageSetup.read(run, "coarse")
        Training(setup, Engine(setup.build_model(), setup.config.train, setup.folder / SWAP)).run()
        assert not multiprocessing.active_children()
    torch.distributed.destroy_process_group()


def reload(run, dump):
    """Loads the newest checkpoint and writes what each rank then holds."""
    from trainer.engine import Engine, start_process_group
    from trainer.setup import SWAP, StageSetup
    from trainer.training import Training

    start_process_group()
    setup = StageSetup.read(run, "coarse")
    training = Training(setup, Engine(setup.build_model(), setup.config.train, setup.folder / SWAP))
    training._start()
    training.checkpoints.folder = dump
    training._save()
    training._finish_save()
    torch.distributed.destroy_process_group()


def copied(run, folder, step, **train):
    """The run as it was at `step`, with some keys of `train` changed."""
    return change(shutil.copytree(run, folder), **train, resume=step)
