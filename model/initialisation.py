"""How a stage's weights start, and how each kind of them is stepped: learning rate and weight decay.

With `transformer.mup_base_dim` both follow μP for Adam (Yang et al. 2022, table 8): with m = dim / base, a matrix that
maps the width to itself starts 1/√m as large and learns 1/m as fast, one that maps the width to logits starts 1/m as
large and learns 1/m as fast, and what maps a fixed size to the width stays. At m = 1 nothing changes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from model.config import TransformerConfig

STD = 0.02
# Above STD, at which codes are drowned by the conditions added to them: the quickstart's semantic stage learnt in about
# half the steps (tried once each). At 0.2 it was faster still and followed prompts less.
EMBEDDING_STD = 0.05


def _width_factor(config: TransformerConfig) -> float:
    return config.dim / config.mup_base_dim if config.mup_base_dim else 1.0


def _maps_width(name: str) -> bool:
    """Whether a matrix takes in hidden states, whose number grows with the model."""
    return name.startswith("transformer.") or name == "heads" or name.endswith("sum_out.weight")


def initialise(stage: nn.Module, config: TransformerConfig) -> None:
    """Fresh weights: normal, zero null vectors, ones in norms."""
    factor = _width_factor(config)
    for name, parameter in stage.named_parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter) if name.endswith("sum_null") else nn.init.ones_(parameter)
        elif name == "embedding.weight":
            nn.init.normal_(parameter, std=EMBEDDING_STD)
        elif name == "heads":
            nn.init.normal_(parameter, std=STD / factor)
        elif name.endswith("sum_in.weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            into_residual = name.endswith(("attention.o.weight", "feed_forward.down.weight"))
            depth = (2 * config.layers) ** 0.5 if into_residual and config.residual_init == "depth" else 1.0
            nn.init.normal_(parameter, std=STD / factor**0.5 / depth)


def parameter_groups(
    stage: nn.Module, config: TransformerConfig, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices decay; embeddings, norms and null vectors do not."""
    factor = _width_factor(config)
    groups: dict[str, list[nn.Parameter]] = {"width": [], "input": [], "kept": []}
    for name, parameter in stage.named_parameters():
        if parameter.dim() < 2 or name == "embedding.weight":
            groups["kept"].append(parameter)
        else:
            groups["width" if _maps_width(name) else "input"].append(parameter)
    settings = {
        # AdamW shrinks by rate × decay: where the rate is lower, the decay is higher by as much.
        "width": {"lr": learning_rate / factor, "weight_decay": weight_decay * factor},
        "input": {"lr": learning_rate, "weight_decay": weight_decay},
        "kept": {"lr": learning_rate, "weight_decay": 0.0},
    }
    return [{"params": members, **settings[kind]} for kind, members in groups.items() if members]
