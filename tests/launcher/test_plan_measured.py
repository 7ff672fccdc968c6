"""The memory that a plan foretells against the tensors that ranks on CPUs hold under the real DeepSpeed engine."""

from __future__ import annotations

import gc
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import CENTROID_DIM, FIELDS, coarse_config, quantizers, random_batch
from ranks import run_ranks

import ds_configs
from launcher.plan_memory import model_memory
from model.config import TransformerConfig
from model.counting import count_stage
from model.fields import CONDITIONING, SEMANTIC
from trainer.config import TrainConfig

MODEL = coarse_config(transformer=TransformerConfig(dim=128, layers=6, heads=2))
ACCUMULATION = 2
CASES = [(zero, "bf16", None) for zero in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")]
CASES += [("zero0", "fp32", None), ("zero3", "fp32", 0.99)]
"""ZeRO choice, precision and `ema_decay`."""
BUCKETS = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
"""Numbers in a buffer between ranks: so few that what is measured is the states of a model of a million parameters."""


def train_config(zero: str, precision: str, ema_decay: float | None, ranks: int) -> TrainConfig:
    batch = ranks * ACCUMULATION
    changes: Any = {"precision": precision, "ema_decay": ema_decay}
    return TrainConfig(ranks=ranks, global_batch=batch, micro_batch=1, zero=zero, compile="off", **changes)


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage counted once."""
    import torch

    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def most_in_a_step(engine: Any, between: bool) -> int:
    """The most bytes at the optimizer's steps of one training step and, where `between`, before its forward passes."""
    from model.dropping import Dropped

    work = [(random_batch(batch=1), Dropped(engine.module.keep_all(1)))] * ACCUMULATION
    engine.train_step(work)  # after it the optimizer has its states
    seen: list[int] = []
    engine._optimizer.register_step_pre_hook(lambda *_: seen.append(live_bytes()))
    if between:
        engine.module.register_forward_pre_hook(lambda *_: seen.append(live_bytes()))
    engine.train_step(work)
    return max(seen)


def measure(folder: str, ranks: int) -> None:
    """Writes the most bytes of model states that this rank holds in a step, for each case.

    That is when the optimizer steps, or between two micro batches, when there are no activations either. (Under ZeRO-3
    there may be gathered weights then, which a plan counts with the buffers.)
    """
    import torch.distributed as dist

    from model.stage import build_stage
    from trainer.engine import Engine, start_process_group

    start_process_group()
    gc.collect()
    gc.freeze()  # what the imports have made need not be looked through each time
    sizes = []
    for zero, precision, ema_decay in CASES:
        settings = ds_configs.read(zero)
        settings["zero_optimization"].update(BUCKETS)
        file = Path(folder) / f"{zero}-rank{dist.get_rank()}.json"
        file.write_text(json.dumps(settings))
        before = live_bytes()
        engine = Engine(build_stage(MODEL, FIELDS, quantizers()), train_config(str(file), precision, ema_decay, ranks))
        sizes.append(most_in_a_step(engine, between=not zero.startswith("zero3")) - before)
        engine._engine.destroy()
        del engine
        gc.collect()
    (Path(folder) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(sizes))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """Bytes of each rank in each case, by the number of ranks."""

    @cache
    def run(ranks: int) -> dict[tuple, list[int]]:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        run_ranks(measure, ranks, folder, str(folder), ranks, timeout=300)
        rows = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        return dict(zip(CASES, zip(*rows, strict=True), strict=True))

    return run


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_states_of_every_rank_are_within_15_percent_of_the_plan(measured, ranks: int) -> None:
    count = count_stage(MODEL, FIELDS, {CONDITIONING: CENTROID_DIM, SEMANTIC: CENTROID_DIM})
    for (zero, precision, ema_decay), sizes in measured(ranks).items():
        train = train_config(zero, precision, ema_decay, ranks)
        zero_settings = ds_configs.read(zero)["zero_optimization"]
        memory = model_memory(count.parameters, train, zero_settings, ranks, ACCUMULATION)
        planned = memory.states + memory.host  # here they are the same memory
        print(f"{ranks} ranks, {zero}, {precision}: planned {planned:,.0f}, measured {', '.join(map(str, sizes))}")
        for size in sizes:
            assert planned == pytest.approx(size, rel=0.15), (zero, precision, ema_decay)


def test_under_zero3_each_rank_holds_its_share(measured) -> None:
    for case in CASES:
        if case[0] == "zero3":
            (alone,) = measured(1)[case]
            for ranks in (2, 4):
                for size in measured(ranks)[case]:
                    assert size == pytest.approx(alone / ranks, rel=0.10), (case, ranks)
