"""Freezes a bundle and a run whose stages are half trained, as this version writes them.

`PYTHONPATH=.:tests python tests/golden/make_format.py` makes `format-N/` for FORMAT_VERSION N where there is none yet.
It is kept for ever: every later version must load it. Never remake one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from ranks import run_ranks
from safetensors.torch import save_file
from small_bundle import ENCODERS, FIELDS, PROMPTS, make_bundle, stage_configs
from torch import Tensor

from data.shard_writer import write_records
from model import MusicPipeline, artifact
from model.bundle import QUANTIZERS
from model.config import STAGES, ExecutionConfig, TransformerConfig
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from trainer.checkpoint_folder import step_name
from trainer.config import StageConfig, TrainConfig

HERE = Path(__file__).parent
STEP, STEPS = 4, 6
SECONDS = 2.0
TRANSFORMER = TransformerConfig(dim=16, layers=1, heads=1, ffn_dim=32)
SMALL_ENCODERS = ENCODERS.model_copy(update={"joint": ENCODERS.joint.model_copy(update={"width": 16})})
WAYS: dict[str, dict] = {"greedy": {"temperature": 0.0}, "drawn": {"seed": 5, "cfg": 2.0}}
"""Ways to make music with the bundle, whose codes are kept."""


class ShownCodes:
    """A codec that shows the codes it is given as a wave, `[clips, frames × quantizers]`."""

    sample_rate = 75

    def decode(self, codes: Tensor) -> Tensor:
        return codes.flatten(1) / FIELDS[ACOUSTIC].codebook_size


def codes_of(bundle: Path, **options) -> Tensor:
    """The acoustic codes `[prompts, frames, quantizers]` that a bundle makes of PROMPTS on a CPU in fp32."""
    pipeline = MusicPipeline.load(bundle, "cpu", "fp32")
    pipeline.codec = ShownCodes()
    made = pipeline.generate(PROMPTS, seconds=1.6, **options).waveform * FIELDS[ACOUSTIC].codebook_size
    return made.round().int().unflatten(1, (-1, FIELDS[ACOUSTIC].quantizers))


def logits_of(bundle: Path) -> dict[str, Tensor]:
    """The logits of each stage of a bundle for one window of codes."""
    pipeline = MusicPipeline.load(bundle, "cpu", "fp32")
    generator = torch.Generator().manual_seed(0)

    def codes(name: str, frames: int) -> Tensor:
        return torch.randint(FIELDS[name].codebook_size, (1, frames, FIELDS[name].quantizers), generator=generator)

    window = {name: codes(name, 1 if name == CONDITIONING else 25) for name in (CONDITIONING, SEMANTIC, ACOUSTIC)}
    for stage in pipeline.stages.values():
        stage.configure(ExecutionConfig(attention="math"))
    with torch.no_grad():
        return {name: stage.logits(window).float() for name, stage in pipeline.stages.items()}


def make_run(run: Path, bundle: Path, steps: int) -> Path:
    """A run folder that is ready to train the three stages of `bundle`, on random codes."""
    train = TrainConfig(steps=steps, global_batch=4, warmup_steps=1, log_every=1, validate_every=99, checkpoint_every=2)
    stages = {name: StageConfig(model=model, train=train) for name, model in stage_configs(TRANSFORMER).items()}
    recipe = {
        "name": "kept",
        "seed": 1,
        "encoders": SMALL_ENCODERS.model_dump(mode="json"),
        "sampling": {},
        "stages": {name: config.model_dump(mode="json") for name, config in stages.items()},
    }
    for name in stages:
        (run / name).mkdir(parents=True)
        (run / name / "stage.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with artifact.create(run / "quantizers", "quantizers", "q") as (path, _):
        shutil.copy(bundle / QUANTIZERS, path / QUANTIZERS)
    with artifact.create(run / "tokens", "tokens", "t") as (path, info):
        for split, count in (("train", 12), ("validation", 4)):
            write_records(path / split, (record(split, number) for number in range(count)))
        info |= {
            "fields": {name: field.to_json() for name, field in FIELDS.items()},
            "clip_seconds": SECONDS,
            "hop_seconds": 5.0,
            "embedding_seconds": 5.0,
            "captions": True,
            "records": {"train": 12, "validation": 4},
            "seconds": SECONDS * 16,
        }
    return run


def record(split: str, number: int) -> dict:
    random = np.random.default_rng((len(split), number))

    def codes(name: str, frames: int) -> np.ndarray:
        field = FIELDS[name]
        return random.integers(field.codebook_size, size=(frames, field.quantizers)).astype(np.uint16)

    frames = round(SECONDS * FIELDS[SEMANTIC].rate_hz)
    return {
        "id": f"clip-{number}",
        "captions": json.dumps(PROMPTS[:1]),
        "conditioning": codes(CONDITIONING, 1),
        "semantic": codes(SEMANTIC, frames),
        "acoustic": codes(ACOUSTIC, frames),
        "text_conditioning": codes(CONDITIONING, 1),
    }


def train_stages(run: Path, loaded: Path | None = None) -> None:
    """For `run_ranks`: trains every stage to its last step. What a stage is when it has taken up its checkpoint is
    saved again in a folder of `loaded`."""
    from trainer.engine import Engine, start_process_group
    from trainer.setup import SWAP, StageSetup
    from trainer.training import Training

    start_process_group()
    for name in STAGES:
        setup = StageSetup.read(run, name)
        training = Training(setup, Engine(setup.build_model(), setup.config.train, setup.folder / SWAP))
        if loaded is not None:
            training._start()
            training.checkpoints.folder, folder = loaded / name, training.checkpoints.folder
            training._save()
            training._finish_save()
            training.checkpoints.folder = folder
        training.run()
    torch.distributed.destroy_process_group()


def set_steps(run: Path, steps: int) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for stage in recipe["stages"].values():
        stage["train"]["steps"] = steps
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def losses(run: Path, stage: str) -> dict[int, float]:
    """The training loss after each step that has been logged."""
    rows = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def main() -> None:
    folder = HERE / f"format-{artifact.FORMAT_VERSION}"
    if folder.exists():
        raise SystemExit(f"{folder} exists and is not remade.")
    bundle = make_bundle(folder / "bundle", encoders=SMALL_ENCODERS, stages=stage_configs(TRANSFORMER))
    run = make_run(folder / "whole", bundle, STEP)
    run_ranks(train_stages, 1, folder / "log", run)
    # The checkpoint is what is kept; the same run left alone tells the losses of the steps after it.
    for name in STAGES:
        kept = folder / "run" / name
        place = Path("checkpoints") / step_name(STEP)
        shutil.copytree(run / name / place, kept / place)
        shutil.copy(run / name / "stage.json", kept)
    set_steps(run, STEPS)
    for name in ("recipe.yaml", "quantizers", "tokens"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, folder / "run" / name)
    run_ranks(train_stages, 1, folder / "log", run)
    after = {name: losses(run, name) for name in STAGES}
    (folder / "losses.json").write_text(json.dumps(after, indent=1) + "\n")
    codes = {f"codes.{way}": codes_of(bundle, **options) for way, options in WAYS.items()}
    logits = {f"logits.{name}": values for name, values in logits_of(bundle).items()}
    save_file({**codes, **logits}, folder / "expected.safetensors")
    shutil.rmtree(run)
    shutil.rmtree(folder / "log")


if __name__ == "__main__":
    main()
