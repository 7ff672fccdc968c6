"""Whether a stage that was exported computes what the trained one does, and what rounding its weights cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.shards import first_records
from data.token_corpus import VALIDATION, TokenCorpus
from data.windows import Cut
from model.fields import CONDITIONING
from model.stage import Batch, StageTransformer
from trainer.setup import StageSetup

WINDOWS = 2
TOLERANCE = 1e-5
"""Largest difference of a logit where nothing was rounded."""
BOUNDS = {"fp16": 0.02, "bf16": 0.1, "int8": 0.3}
"""Largest root mean square of the differences, as a share of the logits' own spread. A few layers give a tenth of it:
what goes beyond is no rounding."""


def example_windows(setup: StageSetup) -> tuple[str, list[Batch]]:
    """Where a few windows for `setup`'s stage are from, and the windows, each a batch of one: the validation shards, or
    random codes where those lie in a bucket."""
    corpus = TokenCorpus.read(setup.tokens)
    if corpus.cached(VALIDATION):
        return "random codes", [_random(setup, number) for number in range(WINDOWS)]
    model, packing = setup.config.model, setup.config.train.packing
    fields = setup.fields_used
    cut = Cut.of(dict(corpus.info), fields, model.window_seconds, 0.0, setup.seed, fixed=True, short=packing)
    windows = []
    for record in first_records(corpus.folder / VALIDATION, WINDOWS):
        codes = cut(record, 0, record["id"])
        windows.append({name: torch.from_numpy(codes[name].astype(np.int64))[None] for name in fields})
    return "validation windows", windows


def _random(setup: StageSetup, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    seconds = setup.config.model.window_seconds

    def codes(name: str) -> Tensor:
        field = setup.fields[name]
        frames = 1 if name == CONDITIONING else field.frames(seconds)
        return torch.randint(field.codebook_size, (1, frames, field.quantizers), generator=generator)

    return {name: codes(name) for name in setup.fields_used}


@torch.inference_mode()
def logits_of(stage: StageTransformer, windows: Sequence[Batch]) -> list[Tensor]:
    """Logits fp32 `[1, frames, quantizers, codebook size]` of each window."""
    stage.eval()
    return [stage.logits(window).float() for window in windows]


def compare(
    name: str, stage: StageTransformer, windows: Sequence[Batch], expected: Sequence[Tensor], rounding: str
) -> dict[str, Any]:
    """What the manifest says of stage `name` as it was exported beside the `expected` logits of the trained one.

    `rounding` is what its weights were rounded to: fp32 (nothing), fp16, bf16 or int8. Raises RuntimeError where the
    logits differ by more than that explains.
    """
    found = logits_of(stage, windows)
    before, after = (torch.cat([part.flatten(0, -2) for part in logits]) for logits in (expected, found))
    targets = torch.cat([stage.own_codes(window).flatten() for window in windows])
    difference = (after - before).abs()
    spread = float(difference.square().mean().sqrt() / before.std().clamp_min(1e-12))
    largest = float(difference.max())
    wrong = not largest <= TOLERANCE if rounding == "fp32" else not spread <= BOUNDS[rounding]  # NaN is wrong too
    if wrong:
        raise RuntimeError(
            f"the exported stage {name!r} does not compute what the trained one does: its logits differ by up to "
            f"{largest:.3g}, {spread:.3g} of their spread, in {rounding}"
        )
    return {
        "largest_difference": largest,
        "share_of_spread": spread,
        "likeliest_changed": float((before.argmax(-1) != after.argmax(-1)).float().mean()),
        "loss_before": float(F.cross_entropy(before, targets)),
        "loss_after": float(F.cross_entropy(after, targets)),
    }
