"""Checkpoints to convert: of Stretto's and of DeepSpeed's, of the very same trainings, and engines that load them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from training_runs import TINY, make_run

RANKS = (1, 2, 4)
ZERO = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
SETTINGS = {
    **TINY,
    "steps": 3,
    "warmup_steps": 1,
    "checkpoint_every": 3,
    "ema_decay": 0.5,
    "global_batch": 4,
    "validate_windows": 4,
}
SMALL = {"transformer": {"dim": 32, "layers": 1, "heads": 1}}
CELLS = [(zero, ranks, precision) for ranks in RANKS for zero in ZERO for precision in PRECISIONS]
STEP = "step-00000003"
LOGITS = "logits"


def cell_name(zero, ranks, precision):
    return f"zero{zero}-{ranks}-{precision}"


def make_cells(folder, ranks):
    """A run folder for each ZeRO stage and precision on so many ranks."""
    return [
        make_run(folder / cell_name(zero, ranks, precision), SMALL, **SETTINGS, zero=f"zero{zero}", precision=precision)
        for zero in ZERO
        for precision in PRECISIONS
    ]


def saved(run):
    """The checkpoint of a cell's run."""
    return run / "coarse" / "checkpoints" / STEP


def train_and_save(*runs):
    """For `run_ranks`: trains in each folder, and has DeepSpeed itself save the same state below it."""
    from trainer.engine import Engine, start_process_group
    from trainer.setup import SWAP, StageSetup
    from trainer.training import Training

    start_process_group()
    for run in runs:
        setup = StageSetup.read(run, "coarse")
        engine = Engine(setup.build_model(), setup.config.train, setup.folder / SWAP)
        Training(setup, engine).run()
        engine._engine.save_checkpoint(run / "native")
        keep_logits(engine, setup)
        engine.destroy()
    torch.distributed.destroy_process_group()


def keep_logits(engine, setup):
    """Writes what the engine's own model gives for a few windows, in the precision it trains in."""
    import deepspeed

    from trainer.export_check import example_windows, logits_of

    model, logits = engine._engine.module, []
    partitioned = engine._engine.zero_optimization_partition_weights()
    for window in example_windows(setup)[1]:
        # For each window anew: ZeRO-3 gives weights up when the modules that hold them have run.
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=partitioned):
            logits += logits_of(model, [window])
    if engine.rank == 0:
        save_file({LOGITS: torch.cat(logits)}, setup.run / f"{LOGITS}.safetensors")


def load_universal(cases):
    """For `run_ranks`: plain DeepSpeed engines load each universal checkpoint and compare what they then hold with the
    weights and moments in a file. A case: folder, ZeRO stage, precision, run to build the model of, file."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from model.initialisation import parameter_groups
    from trainer.engine import start_process_group
    from trainer.setup import StageSetup

    start_process_group()
    for folder, zero, precision, run, expected in cases:
        model = StageSetup.read(run, "coarse").build_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = torch.optim.AdamW(parameter_groups(model, model.config.transformer, 1e-3, 0.1))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": True},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        assert engine.global_steps == 3
        wanted = load_file(expected)
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(safe_get_full_fp32_param(parameter), wanted[f"weights {name}"]), (folder, zero, name)
            for kind in ("exp_avg", "exp_avg_sq"):
                found = safe_get_full_optimizer_state(parameter, kind)
                assert torch.equal(found, wanted[f"{kind} {name}"]), (folder, zero, kind, name)
        steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
        assert steps == {3.0}, steps
        engine.destroy()
    torch.distributed.destroy_process_group()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bytes(one, other, besides=()):
    """Whether two folders hold the same files, but for those called `besides`."""
    found = [
        {name: value for name, value in contents(folder).items() if name not in besides} for folder in (one, other)
    ]
    return found[0] == found[1]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
