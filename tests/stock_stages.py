"""Small stages for every way in which one enters `transformers`, and the codes that they and their checkpoints make."""

from __future__ import annotations

import torch
from helpers import FIELDS, coarse_config, quantizers

from model.config import ConditionConfig, ExecutionConfig, TransformerConfig
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.sampling import Sampler, generate_window
from model.stage import build_stage
from model.stock import StageCodes

PREFIX = [ConditionConfig(field=CONDITIONING), ConditionConfig(field=SEMANTIC)]
DESCRIBED = [ConditionConfig(field=CONDITIONING, last=2)]
SUMMED = [ConditionConfig(field=CONDITIONING, paths=["summed"]), ConditionConfig(field=SEMANTIC, paths=["summed"])]
ALIGNED = [ConditionConfig(field=CONDITIONING, paths=["aligned"]), ConditionConfig(field=SEMANTIC, paths=["aligned"])]
OWN_FIELD = [ConditionConfig(field=ACOUSTIC, first=2, last=3)]
EVERY = [
    ConditionConfig(field=CONDITIONING, paths=["prefix", "summed"]),
    ConditionConfig(field=SEMANTIC, paths=["prefix", "aligned"]),
]
# pattern, positions, conditions, quantizers predicted, whether a stock model computes it
STAGES = {
    "flat-index-none": ("flat", "index", [], 2, True),
    "flat-index-prefix": ("flat", "index", PREFIX, 2, True),
    "flat-index-own-field": ("flat", "index", OWN_FIELD, 2, True),
    "flat-index-aligned": ("flat", "index", ALIGNED, 2, False),
    "flat-index-summed": ("flat", "index", SUMMED, 2, False),
    "flat-time-none": ("flat", "time", [], 3, True),
    "flat-time-as-many": ("flat", "time", DESCRIBED, 2, True),
    "flat-time-more": ("flat", "time", DESCRIBED, 1, False),
    "flat-time-prefix": ("flat", "time", PREFIX, 2, False),
    "flat-time-every": ("flat", "time", EVERY, 2, False),
    "delay-index-one": ("delay", "index", PREFIX, 1, True),
    "delay-index-prefix": ("delay", "index", PREFIX, 3, False),
    "delay-time-none": ("delay", "time", [], 3, False),
    "delay-time-prefix": ("delay", "time", PREFIX, 2, False),
    "delay-time-aligned": ("delay", "time", ALIGNED, 2, False),
    "delay-time-summed": ("delay", "time", SUMMED, 2, False),
    "delay-time-every": ("delay", "time", EVERY, 2, False),
}
FRAMES = 7


def build(case: str, qk_norm: bool):
    pattern, positions, conditions, last, _ = STAGES[case]
    torch.manual_seed(0)
    transformer = TransformerConfig(dim=32, layers=2, heads=4, kv_heads=2, qk_norm=qk_norm, rope_theta=5_000.0)
    settings = {"pattern": pattern, "positions": positions, "conditions": conditions, "last": last}
    config = coarse_config(**settings, transformer=transformer, window_seconds=1.0)
    stage = build_stage(config, FIELDS, quantizers()).eval()
    for parameter in stage.parameters():  # large enough for every part to matter
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    stage.configure(ExecutionConfig())
    return stage


def ours(stage, window, frames=FRAMES, known=None, cfg=1.0, dropped=None):
    conditions = {part.field.name: window[part.field.name] for part in stage.conditions}
    uniform = torch.zeros(2, frames, len(stage.quantizers))
    sampler = Sampler(temperature=0, cfg=cfg)
    return generate_window(stage, conditions, frames, sampler, uniform, known, dropped=dropped)


def theirs(model, stage, window, frames=FRAMES, known=None, cfg=1.0, dropped=False):
    """The codes that the checkpoint makes, as its README says."""
    conditions = {part.field.name: window[part.field.name] for part in stage.conditions}
    if hasattr(model, "layout"):
        options = {} if dropped is False else {"dropped": dropped}
        return model.generate(conditions, frames, known, batch=2, do_sample=False, guidance_scale=cfg, **options)
    codes = StageCodes(model.config)
    prompt = codes.prompt(conditions, known, dropped, batch=2)
    new = (frames - (0 if known is None else known.shape[1])) * len(stage.quantizers)
    guidance = {}
    if cfg != 1:
        guidance = {"guidance_scale": cfg, "negative_prompt_ids": codes.prompt(conditions, known, True, batch=2)}
    return codes.decode(
        model.generate(prompt, logits_processor=[codes], do_sample=False, max_new_tokens=new, **guidance)
    )
