"""Stages frozen by earlier versions load and give the logits they gave, with every attention backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model.config import ExecutionConfig, StageModelConfig
from model.fields import TokenField
from model.stage import build_stage

STAGES = sorted(Path(__file__).parent.glob("stage-*.safetensors"))
BACKENDS = [("math", torch.float64), ("math", torch.float32), ("sdpa", torch.float64), ("sdpa", torch.float32)]


def load(path):
    """The stage, its batch and its logits."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    fields = {name: TokenField.from_json(value) for name, value in json.loads(metadata["fields"]).items()}
    config = StageModelConfig.model_validate_json(metadata["config"])
    stage = build_stage(config, fields, part("centroids."))
    stage.load_state_dict(part("weights."))
    return stage.eval(), {name: codes.long() for name, codes in part("codes.").items()}, tensors["logits"]


def test_there_are_frozen_stages():
    assert len(STAGES) >= 2


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("attention", "dtype"), BACKENDS)
def test_a_frozen_stage_gives_its_logits(path, attention, dtype):
    stage, batch, expected = load(path)
    stage.to(dtype).configure(ExecutionConfig(attention=attention))
    with torch.no_grad():
        logits = stage.logits(batch)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_in_bf16_a_frozen_stage_stays_near_its_logits(path):
    stage, batch, expected = load(path)
    stage.to(torch.bfloat16).configure(ExecutionConfig())
    with torch.no_grad():
        difference = stage.logits(batch).float() - expected
    assert difference.std() < 0.03 * expected.std()
