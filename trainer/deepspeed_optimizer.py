"""What optimizers keep in the checkpoints of DeepSpeed's engines, under ZeRO and without."""

from __future__ import annotations

from typing import Any

from trainer.tensor_files import WEIGHTS, Stretch, plain

STATE = "optimizer_state_dict"
COMMON = ("global_steps", "skipped_steps", "global_samples", "lr_scheduler", "ds_version")


def kept(base: dict[str, Any], number: int, weights: Stretch, step: Any) -> tuple[dict[str, Stretch], Any]:
    """The flat tensors of a group, and the step that its optimizer has come to."""
    own = base["state"].get(number, {})
    flat = {kind: value for kind, value in own.items() if isinstance(value, Stretch) and value.shape}
    if "step" in own:
        step = step_value(own["step"])
    return {WEIGHTS: weights, **flat}, step


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of each of the optimizer's groups that are plain values."""
    return [
        plain({key: value for key, value in group.items() if key not in ("params", "param_names")}) for group in groups
    ]


def common(first: dict[str, Any]) -> dict[str, Any]:
    """What an engine keeps beside the tensors, in plain values."""
    return plain({name: first.get(name) for name in COMMON})


def step_value(step: Any) -> Any:
    return step.item() if isinstance(step, Stretch) else step
