"""Every file of ds_configs/ trains: two steps under the real engine, with the losses of the plain one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch
from nvme import COMPILES, nvme
from ranks import run_ranks

import ds_configs
from model.config import TransformerConfig
from model.dropping import draw_dropped
from model.stage import build_stage
from trainer.config import TrainConfig

__all__ = ["nvme"]

BATCH = 4
STEPS = 2
NVME = "zero3_nvme"
LARGE = 512
"""Width from which DeepSpeed moves weights to NVMe: what is smaller than 1 MiB stays."""


def losses_of(zero, precision, width):
    """The loss before each step and after the last, on all ranks together, and the sum of the trained weights."""
    from torch import distributed

    from trainer.engine import Engine

    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    torch.manual_seed(0)
    model = build_stage(
        coarse_config(transformer=TransformerConfig(dim=width, layers=2, heads=width // 64)), FIELDS, quantizers()
    )
    config = TrainConfig(zero=zero, ranks=ranks, global_batch=BATCH, micro_batch=1, precision=precision, ema_decay=0.9)
    engine = Engine(model, config)
    losses = []
    for step in range(STEPS + 1):
        batch = random_batch(batch=BATCH, seed=step)
        own = [{name: codes[index : index + 1] for name, codes in batch.items()} for index in range(rank, BATCH, ranks)]
        if step == STEPS:
            loss = engine.mean(torch.stack([engine.evaluate(window)[0] for window in own]).mean())
        else:
            _, frames, count = model.own_codes(own[0]).shape
            dropped = draw_dropped(model.config, torch.tensor([step]), frames, count)
            loss = engine.train_step([(window, dropped) for window in own]).mean()
        losses.append(float(loss))
    total = sum(float(weights.double().sum()) for _, weights in engine.full_weights())
    return [*losses, total]


def train_all(folder, files, precision, width):
    """On each rank: the files one after another; rank 0 writes down what `losses_of` says of each."""
    from torch import distributed

    from trainer.engine import start_process_group

    start_process_group()
    found = {name: losses_of(zero, precision, width) for name, zero in files.items()}
    if distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def train(folder, ranks, files, precision="fp32", width=64, timeout=120.0):
    run_ranks(train_all, ranks, folder, folder, files, precision, width, timeout=timeout)
    return json.loads((folder / "losses.json").read_text())


def check_same(losses, relative):
    plain = losses["zero0"]
    assert plain[0] == pytest.approx(5.5, rel=0.05)  # ln 256
    assert len(set(plain)) == len(plain)
    for name, found in losses.items():
        assert found == pytest.approx(plain, rel=relative), name


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_every_file_trains_alike(ranks, precision, tmp_path):
    files = {name: name for name in ds_configs.names() if name != NVME}
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"} <= files.keys()
    check_same(train(tmp_path, ranks, files, precision), 1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.timeout(COMPILES + 60)
@pytest.mark.usefixtures("nvme")
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_on_nvme_train_alike(ranks, tmp_path):
    settings = ds_configs.read(NVME)
    for part in ("offload_optimizer", "offload_param"):
        settings["zero_optimization"][part]["nvme_path"] = str(tmp_path / "nvme")
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(settings))
    check_same(train(tmp_path, ranks, {"zero0": "zero0", NVME: str(file)}, width=LARGE), 1e-5)
    moved = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "nvme").rglob("*.swp")]
    for rank in range(ranks):
        for what in ("optimizer", "float32params"):
            assert any(f"{what}/rank{rank}/" in path for path in moved), (what, rank, moved)
    assert any("/exp_avg_sq-" in path for path in moved)
    assert any("/average-" in path for path in moved)
