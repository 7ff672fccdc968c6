"""A job of ranks that trains one stage of a recipe on shards of random codes, as `trainer` does but without the
launcher: what the benchmarks of the training loop work on."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data.shard_writer import write_records
from launcher.recipe import RECIPE, Recipe, dump_recipe
from model import artifact
from model.config import StageName
from model.counting import StageCount, count_stage, token_fields
from model.fields import CONDITIONING, TokenField
from trainer.__main__ import log_to
from trainer.engine import Engine, start_process_group
from trainer.setup import StageSetup
from trainer.training import Training
from trainer.watchdog import Heartbeat, Watchdog

NEVER = 1_000_000_000
"""Steps between things that are not to happen."""
VALIDATION_CLIPS = 16


def make_run(run: Path, recipe: Recipe, stage: StageName, clips: int) -> None:
    """A new run folder that is ready to train `stage`, on `clips` clips."""
    fields = token_fields(recipe.encoders, recipe.quantizers)
    (run / stage).mkdir(parents=True)
    (run / RECIPE).write_text(dump_recipe(recipe))
    artifact.write_json(run / stage / "stage.json", {"fingerprint": "0" * 16})
    conditioning = fields[CONDITIONING]
    with artifact.create(run / "quantizers", "quantizers", "0" * 16) as (folder, _):
        centroids = torch.randn(conditioning.quantizers, conditioning.codebook_size, recipe.encoders.joint.dim)
        save_file({CONDITIONING: centroids}, folder / "quantizers.safetensors")
    seconds, random = recipe.data.clip_seconds, np.random.default_rng(0)
    with artifact.create(run / "tokens", "tokens", "0" * 16) as (folder, info):
        for split, count in (("train", clips), ("validation", VALIDATION_CLIPS)):
            write_records(folder / split, (record(split, number, fields, seconds, random) for number in range(count)))
        info |= {
            "fields": {name: field.to_json() for name, field in fields.items()},
            "clip_seconds": seconds,
            "hop_seconds": recipe.encoders.joint.hop_seconds,
            "embedding_seconds": recipe.encoders.joint.window_seconds,
            "captions": True,
        }


def record(
    split: str, number: int, fields: dict[str, TokenField], seconds: float, random: np.random.Generator
) -> dict[str, Any]:
    """One clip of random codes."""

    def codes(field: TokenField, frames: int) -> np.ndarray:
        return random.integers(field.codebook_size, size=(frames, field.quantizers), dtype=np.uint16)

    return {
        "id": f"{split}-{number}",
        "captions": '["a tune"]',
        **{name: codes(field, max(1, field.frames(seconds))) for name, field in fields.items()},
        "text_conditioning": codes(fields[CONDITIONING], 1),
    }


def counted(recipe: Recipe, stage: StageName) -> StageCount:
    fields = token_fields(recipe.encoders, recipe.quantizers)
    return count_stage(getattr(recipe.stages, stage).model, fields, {CONDITIONING: recipe.encoders.joint.dim})


def run_job(job: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """What `job(*arguments)` returns on rank 0, plain JSON. Every rank is a new process, with the environment and the
    share of the cores that the launcher would give it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        torch.multiprocessing.spawn(_rank, (job, arguments, ranks, free_port(), result), nprocs=ranks)
        return json.loads(result.read_text())


def _rank(rank: int, job: Callable[..., Any], arguments: tuple[Any, ...], ranks: int, port: int, result: Path) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    found = job(*arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # multiprocessing leaves them out; shards clear their shared memory there


@contextlib.contextmanager
def opened(run: Path, stage: StageName) -> Iterator[Training]:
    """The training that `trainer` would run as this rank, under its watchdog."""
    setup = StageSetup.read(run, stage)
    config = setup.config.train
    start_process_group(config.collective_timeout)
    rank, heartbeat = dist.get_rank(), Heartbeat()
    logs = setup.folder / "logs" / f"rank-{rank:04d}.log"
    log_to(logs, quiet=True)
    limits = config.hang_timeout, config.startup_timeout
    with Watchdog(heartbeat, setup.folder / "heartbeat", logs, rank, dist.get_world_size(), *limits):
        yield Training(setup, Engine(setup.build_model(), config), heartbeat)


def free_port() -> int:
    """A port that is free now; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
