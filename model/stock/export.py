"""One stage of a bundle as a checkpoint that `transformers` loads.

A stage that a stock Llama or Qwen3 computes becomes one; any other goes with a modelling file of its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from model import artifact
from model.bundle import open_bundle
from model.config import SamplingConfig, StageName
from model.dropping import Dropped
from model.errors import UserError
from model.stage import Batch, StageTransformer
from model.stock.bundles import stage_called, stage_of
from model.stock.card import model_card
from model.stock.layout import MODELLING, config_json, generation_json, is_stock, some_window, window_frames
from model.stock.modeling_stretto import StrettoStage
from model.stock.stage_codes import StageCodes
from model.stock.weights import save_tensors, to_tensors

KIND = "transformers"
CODES = "stage_codes"
"""The module that makes prompts and reads codes, which goes along with a stock model."""
TOLERANCE = 1e-4
"""Largest difference of a logit in fp32, for logits up to 1 and in proportion above: products round otherwise."""
COMPARED_FRAMES = 8
SPARE_BYTES = 1 << 20
"""For headers, settings, code and the card."""


@dataclass(frozen=True)
class Exported:
    """`architecture` is the class that loads it; `difference` is the largest between its logits and ours."""

    path: Path
    architecture: str
    difference: float


def export_stage(bundle_path: Path, name: str, output: Path) -> Exported:
    """Writes stage `name` of the bundle to the new folder `output`, which gets its name once its logits are ours.

    Raises UserError where there is no such stage, the bundle is not whole, its weights are not finite or the disk has
    too little room.
    """
    bundle, stage_name = open_bundle(bundle_path, verify=True), stage_called(name)
    stage = stage_of(bundle, stage_name)
    artifact.require_room(output, sum(value.nbytes for value in to_tensors(stage).values()) + SPARE_BYTES)
    for weight, value in stage.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"{weight} of stage {name!r} is not finite: export an earlier checkpoint, or train again.")
    origin = artifact.fingerprint(bundle.fingerprint, stage_name)
    with artifact.create(output, KIND, origin, {"bundle": bundle.fingerprint}) as (folder, info):
        sampling = SamplingConfig.model_validate(bundle.info["sampling"])
        architecture = write_stage(stage, stage_name, folder, sampling, bundle.info.get("recipe"))
        difference = compare(stage, folder)
        info.update(stage=stage_name, architecture=architecture, difference=difference)
    return Exported(output, architecture, difference)


def write_stage(
    stage: StageTransformer, name: StageName, folder: Path, sampling: SamplingConfig, recipe: str | None = None
) -> str:
    """Fills `folder` with the files of the checkpoint; returns the class that loads it."""
    config = config_json(stage, name)
    artifact.write_json(folder / "config.json", config)
    artifact.write_json(folder / "generation_config.json", generation_json(stage, name, sampling))
    save_tensors(to_tensors(stage), folder)
    module = CODES if is_stock(stage) else MODELLING
    shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")
    (folder / artifact.CARD).write_text(model_card(stage, config, recipe, sampling))
    return config["architectures"][0]


@torch.no_grad()
def compare(stage: StageTransformer, folder: Path) -> float:
    """The largest difference between the logits of `stage` and those of the checkpoint in `folder`.

    Over random codes, with all conditions and with none. Raises RuntimeError where it is more than rounding makes.
    """
    frames = min(window_frames(stage), COMPARED_FRAMES)
    window = some_window(stage, frames, 2, torch.Generator().manual_seed(0))
    dropped = torch.tensor([[False], [True]]).expand(2, len(stage.conditions))
    ours = stage.logits(window, Dropped(dropped))
    theirs = (stock_logits if is_stock(stage) else own_logits)(folder, window, stage.own_codes(window), dropped)
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"logits of the checkpoint differ by {difference:.2g} from those of the bundle")
    return difference


def stock_logits(folder: Path, window: Batch, codes: Tensor, dropped: Tensor) -> Tensor:
    """`[B, T, Q, codebook size]` of a Llama or Qwen3: one step's are the rows of its quantizer."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    ids = StageCodes(model.config).prompt(window, codes, dropped)
    logits = model(ids[:, :-1], logits_to_keep=codes[0].numel()).logits.unflatten(1, codes.shape[1:])
    predicts = config["stretto"]["predicts"]
    ranges = [slice(first, first + predicts["codebook_size"]) for first in predicts["first_ids"]]
    return torch.stack([logits[:, :, q, ids] for q, ids in enumerate(ranges)], dim=2)


def own_logits(folder: Path, window: Batch, codes: Tensor, dropped: Tensor) -> Tensor:
    """The same of a checkpoint with the modelling file, by the file it was copied from."""
    model = StrettoStage.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return model(codes, window, dropped).logits
