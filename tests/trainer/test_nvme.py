"""Training with weights and optimizer state on NVMe: saved, gone on from, with other ZeRO choices too, and cleared."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from nvme import COMPILES, nvme
from ranks import run_ranks, start_ranks
from training_runs import checkpoint, copied, holdings, job, make_run, reload, rows, train_all, weights_digest

import ds_configs
from model.config import TransformerConfig
from trainer.exit_codes import SAVED
from trainer.setup import SWAP

__all__ = ["nvme"]

pytestmark = [pytest.mark.timeout(COMPILES + 300), pytest.mark.usefixtures("nvme")]

WIDE = {"transformer": TransformerConfig(dim=512, layers=1, heads=8)}
"""DeepSpeed moves a rank's part of a matrix to NVMe from 1 MiB on."""
SETTINGS = {
    "steps": 6,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "log_every": 1,
    "validate_every": 99,
    "checkpoint_every": 3,
    "keep_last": 99,
    "ema_decay": 0.9,
    "precision": "fp32",
}


@pytest.fixture
def zero(tmp_path):
    """ds_configs/zero3_nvme.json with smaller buffers."""
    settings = ds_configs.read("zero3_nvme")
    settings["zero_optimization"]["offload_param"]["buffer_size"] = 2_000_000
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(settings))
    return str(file)


def stopped(run):
    """Trains, and is told to stop in its third step."""
    from trainer import training
    from trainer.callback import Callback

    class Stop(Callback):
        def before_step(self, training):
            if training.step == 2:
                assert list((run / "coarse" / SWAP).rglob("average-*.swp"))
                os.kill(os.getpid(), signal.SIGTERM)

    others = training.callbacks
    training.callbacks = lambda *arguments: [*others(*arguments), Stop()]
    return job(run)


def test_a_training_that_was_stopped_goes_on_bit_for_bit_and_leaves_no_swap(tmp_path, zero):
    alone, run = (make_run(tmp_path / name, WIDE, zero=zero, **SETTINGS) for name in ("alone", "run"))
    run_ranks(train_all, 2, tmp_path / "alone log", alone)
    assert start_ranks(stopped, 2, tmp_path / "stopped log", run).wait() == [SAVED] * 2
    swap = run / "coarse" / SWAP
    assert not swap.exists()
    swap.mkdir()
    (swap / "left by a killed job").touch()
    run_ranks(job, 2, tmp_path / "log", run)
    assert not swap.exists()
    assert weights_digest(run) == weights_digest(alone)
    last = [holdings(checkpoint(folder, SETTINGS["steps"])) for folder in (run, alone)]
    assert {kind for kind, _ in last[0]} == {"weights", "exp_avg", "exp_avg_sq", "average"}
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[1])


@pytest.mark.parametrize(
    ("before", "ranks", "after", "new_ranks"),
    [(None, 2, "zero3", 1), ("zero2", 1, None, 2)],
    ids=["from NVMe to zero3", "from zero2 to NVMe"],
)
def test_a_run_goes_on_with_another_zero(tmp_path, zero, before, ranks, after, new_ranks):
    """What is loaded is what was saved, to the bit, and the losses are those of the run left alone."""
    alone = make_run(tmp_path / "alone", WIDE, zero=before or zero, **SETTINGS)
    run_ranks(train_all, ranks, tmp_path / "alone log", alone)
    run, dump = copied(alone, tmp_path / "run", 3, zero=after or zero), tmp_path / "dump"
    run_ranks(reload, new_ranks, tmp_path / "reload log", run, dump)
    saved, loaded = holdings(checkpoint(alone, 3)), holdings(dump / "step-00000003")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    run_ranks(train_all, new_ranks, tmp_path / "log", run)
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def looked_at(run):
    """Looks at what an engine holds before it has stepped, twice, and afterwards writes it down."""
    from torch import distributed

    from trainer.engine import Engine, start_process_group
    from trainer.setup import StageSetup
    from trainer.training import Training

    start_process_group()
    setup = StageSetup.read(run, "coarse")
    engine = Engine(setup.build_model(), setup.config.train, setup.folder / SWAP)
    fresh = dict(engine.module.named_parameters())
    for _ in range(2):
        for fragment in engine.held():
            assert fragment.name in fresh
            assert torch.equal(fragment.tensors["average"], fragment.tensors["weights"])
            assert not fragment.tensors["exp_avg"].any()
            assert not fragment.tensors["exp_avg_sq"].any()
    Training(setup, engine).run()
    distributed.destroy_process_group()


def test_what_is_looked_at_before_the_first_step_changes_nothing(tmp_path, zero):
    runs = [make_run(tmp_path / name, WIDE, zero=zero, **{**SETTINGS, "steps": 3}) for name in ("alone", "run")]
    run_ranks(train_all, 1, tmp_path / "alone log", runs[0])
    run_ranks(looked_at, 1, tmp_path / "log", runs[1])
    assert weights_digest(runs[1]) == weights_digest(runs[0])
