"""The README of an exported stage: what it is and how to use it."""

from __future__ import annotations

from typing import Any

from model.config import SamplingConfig
from model.stage import StageTransformer
from model.stock.layout import BLOCK, is_stock

STOCK = """\
    import torch
    from transformers import AutoModelForCausalLM
    from stage_codes import StageCodes       # the file beside this one; where Stretto is installed, model.stock

    model = AutoModelForCausalLM.from_pretrained(".")
    codes = StageCodes(model.config)
    conditions = {conditions}
    made = model.generate(codes.prompt(conditions), logits_processor=[codes])
    print(codes.decode(made))                # [batch, frames, quantizers]

`StageCodes` makes ids of codes, keeps `generate` to the codes of the quantizer whose turn it is, and makes codes of
ids. A window that starts with known codes goes on from `codes.prompt(conditions, known)`, to its end with
`max_new_tokens=model.generation_config.max_new_tokens - known[0].numel()`. Guidance with a scale of {guidance:g} is

    model.generate(
        codes.prompt(conditions), logits_processor=[codes],
        guidance_scale={guidance:g}, negative_prompt_ids=codes.prompt(conditions, dropped=True),
    )
"""
OWN = """\
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    conditions = {conditions}
    print(model.generate(conditions))        # [batch, frames, quantizers]
    model(codes, conditions).loss            # to train it further

No stock model computes this stage, so `modeling_stretto.py` goes along, which `trust_remote_code` runs: read it first.
It needs torch and transformers alone. `generate` takes `frames`, `known`, `do_sample`, `temperature`, `top_k`, `top_p`
and `guidance_scale`.
"""


def model_card(stage: StageTransformer, config: dict[str, Any], recipe: str | None, sampling: SamplingConfig) -> str:
    """The text; `config` is the checkpoint's."""
    block = config[BLOCK]
    fields = {part.field.name: part.field for part in stage.conditions}
    shapes = {name: f"torch.zeros(1, {_frames(block, name)}, {field.quantizers}, dtype=torch.long)"
              for name, field in fields.items()}  # fmt: skip
    conditions = "{" + ", ".join(f'"{name}": {shape}' for name, shape in shapes.items()) + "}"
    scale = sampling.cfg.get(block["stage"], 1.0)
    guidance = 2.0 if scale == 1 else scale
    use = (STOCK if is_stock(stage) else OWN).replace("{conditions}", conditions)
    predicts = block["predicts"]
    first = predicts["first_quantizer"]
    return "\n".join(
        [
            f"# Stage `{block['stage']}` of a music model made by Stretto" + (f" from `{recipe}`" if recipe else ""),
            "",
            f"A `{config['architectures'][0]}`, in fp32. It predicts the field `{predicts['field']}`, quantizers from "
            f"{first} up to {first + predicts['quantizers']} ({predicts['codebook_size']} codes each, "
            f"{predicts['rate_hz']:g} frames a second), "
            f"up to {block['frames']} frames, which are {block['window_seconds']:g} s.",
            "",
            use.replace("{guidance:g}", f"{guidance:g}"),
            "Codes are integers `[batch, frames, quantizers]`, as the bundle's encoders and quantizers make them.",
            "What the ids mean is in the block `stretto` of `config.json`, which docs/transformers.md of Stretto",
            "explains. With it kept as it is, a stage trained further goes back into the bundle:",
            "",
            f"    stretto import-transformers CHECKPOINT BUNDLE OUT --stage {block['stage']}",
            "",
        ]
    )


def _frames(block: dict[str, Any], field: str) -> int:
    part = next(part for part in block["conditions"] if part["field"] == field)
    over, under = part["frames_per_target_frame"]
    return 1 if part["whole_window"] else -(-block["frames"] * over // under)
