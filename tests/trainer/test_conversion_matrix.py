"""Whatever ZeRO stage, number of ranks and precision a stage was trained with, all that it can become computes what the
training engine did."""

from __future__ import annotations

import pytest
import torch
import yaml
from conversions import CELLS, LOGITS, SMALL, cell_name, saved
from finished_run import make_finished_stage
from helpers import CONVERSIONS, fine_config, quantizers
from safetensors.torch import load_file

from data.progress import Progress
from model import artifact
from model.bundle import QUANTIZERS, load_stage, open_bundle, read_tensors
from model.config import ConditionConfig, EncodersConfig, StageModelConfig
from model.fields import CONDITIONING, SEMANTIC
from model.stock.export import export_stage, own_logits
from trainer.config import StageConfig, TrainConfig
from trainer.convert import convert
from trainer.export import export_bundle
from trainer.export_check import example_windows, logits_of
from trainer.saved_sources import open_saved
from trainer.setup import WEIGHTS, StageSetup
from trainer.tensor_files import WEIGHTS as KIND

TOLERANCES = {"universal": 1e-5, "fp32": 1e-5, "bundle": 1e-5, "transformers": 1e-4}


def complete(run):
    """Adds to a run whose coarse stage is trained all else that a bundle is made of."""
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    described = [ConditionConfig(field=CONDITIONING, paths=["prefix"])]
    semantic = StageModelConfig(field=SEMANTIC, conditions=described, window_seconds=2.0, **SMALL)
    stages = {"semantic": semantic, "fine": fine_config(**SMALL)}
    for name, model in stages.items():
        recipe["stages"][name] = StageConfig(model=model, train=TrainConfig(steps=6, warmup_steps=1)).model_dump(
            mode="json"
        )
    path.write_text(yaml.safe_dump({**recipe, "encoders": EncodersConfig().model_dump(mode="json"), "sampling": {}}))
    for name in ("codec", "embedding"):
        with artifact.create(run / name, name, name) as (folder, _):
            (folder / "nothing").write_text("their encoders are of no use here\n")
    for name, model in stages.items():
        make_finished_stage(run, name, model, quantizers())


def converted(run, folder):
    """Logits `[windows, frames, quantizers, codebook size]` by what the run's checkpoint was converted to."""
    setup = StageSetup.read(run, "coarse")
    windows = example_windows(setup)[1]
    stage = setup.build_model()
    found = {}
    for to in ("universal", "fp32"):
        convert(saved(run), folder / to, to)
        state = open_saved(folder / to)
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                state.fill(KIND, name, 0, parameter.zero_().view(-1))
        found[to] = logits_of(stage, windows)
    with artifact.create(folder / "bundle", "bundle", "0" * 16) as (partial, info):
        info.update(export_bundle(run, partial, Progress()))
    bundle = open_bundle(folder / "bundle", verify=True)
    found["bundle"] = logits_of(
        load_stage(bundle.path, bundle.info, "coarse", read_tensors(bundle.path / QUANTIZERS)), windows
    )
    export_stage(bundle.path, "coarse", folder / "transformers")
    none_dropped = torch.zeros(1, len(stage.conditions), dtype=torch.bool)
    with torch.no_grad():
        found["transformers"] = [
            own_logits(folder / "transformers", window, stage.own_codes(window), none_dropped) for window in windows
        ]
    return {name: torch.cat(logits) for name, logits in found.items()}


@pytest.mark.parametrize(("zero", "ranks", "precision"), CELLS)
def test_every_cell_computes_what_the_training_engine_did(trained, tmp_path, record_property, zero, ranks, precision):
    run = trained / cell_name(zero, ranks, precision)
    complete(run)
    found = converted(run, tmp_path)
    engine = load_file(run / f"{LOGITS}.safetensors")[LOGITS]
    setup = StageSetup.read(run, "coarse")
    stage = setup.build_model()
    stage.load_state_dict(load_file(run / "coarse" / WEIGHTS))
    weights = torch.cat(logits_of(stage, example_windows(setup)[1]))
    for name, logits in found.items():
        # An engine in bf16 rounds all that it computes; what it keeps in fp32 is what leaves it.
        expected = engine if precision == "fp32" else weights
        assert (logits - expected).abs().max() <= TOLERANCES[name], name
        assert (logits - engine).square().mean().sqrt() <= 0.05 * engine.std(), name
    differences = {name: float((logits - engine).abs().max()) for name, logits in found.items()}
    record_property(CONVERSIONS, [run.name, differences])
