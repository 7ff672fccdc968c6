"""Freezes two tiny stages with their inputs and logits: `python tests/golden/make_stages.py`.

The files are kept for ever: every later version must load them and give these logits. Add others; never remake these.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers import FIELDS, coarse_config, quantizers, random_batch

from model.config import ConditionConfig, ExecutionConfig, TransformerConfig
from model.fields import CONDITIONING, SEMANTIC
from model.stage import build_stage

HERE = Path(__file__).parent
STAGES = {
    "stage-flat-prefix": coarse_config(
        window_seconds=1.0,
        conditions=[ConditionConfig(field=CONDITIONING), ConditionConfig(field=SEMANTIC)],
        transformer=TransformerConfig(dim=32, layers=2, heads=2, qk_norm=False),
    ),
    "stage-delay-every-path": coarse_config(
        window_seconds=1.0,
        pattern="delay",
        conditions=[
            ConditionConfig(field=CONDITIONING, paths=["prefix", "summed"]),
            ConditionConfig(field=SEMANTIC, paths=["prefix", "aligned"]),
        ],
        transformer=TransformerConfig(dim=32, layers=2, heads=4, kv_heads=2),
    ),
}


def main() -> None:
    for name, config in STAGES.items():
        path = HERE / f"{name}.safetensors"
        if path.exists():
            raise SystemExit(f"{path} exists and is not remade.")
        torch.manual_seed(0)
        stage = build_stage(config, FIELDS, quantizers())
        for parameter in stage.parameters():  # sharp enough for every part to matter
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
        weights = {f"weights.{key}": value for key, value in stage.state_dict().items()}
        centroids = {f"centroids.{key}": value for key, value in quantizers().items()}
        batch = random_batch(seconds=1.0, batch=2)
        inputs = {f"codes.{key}": value.to(torch.int32) for key, value in batch.items()}
        stage.configure(ExecutionConfig(attention="math"))
        logits = stage.double().logits(batch).detach().float()
        metadata = {
            "config": config.model_dump_json(),
            "fields": json.dumps({key: field.to_json() for key, field in FIELDS.items()}),
        }
        save_file({**weights, **centroids, **inputs, "logits": logits}, path, metadata)


if __name__ == "__main__":
    main()
