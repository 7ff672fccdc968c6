"""What a stage refuses: codes and windows that do not fit it, each named with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from torch import Tensor

from model.config import ConditionConfig, StageModelConfig
from model.errors import UserError
from model.fields import CONDITIONING, TokenField


def check_quantizers(config: StageModelConfig, fields: Mapping[str, TokenField]) -> None:
    """Raises UserError where a stage names a field, or quantizers of it, that are not there."""
    parts: list[StageModelConfig | ConditionConfig] = [config, *config.conditions]
    for part in parts:
        if part.field not in fields:
            raise UserError(f"there is no field {part.field!r}: the tokens hold {', '.join(fields)}.")
        count = fields[part.field].quantizers
        last = count if part.last is None else part.last
        if not part.first < last <= count:
            raise UserError(
                f"quantizers {part.first} up to {last} of field {part.field!r} were asked for, which has {count}."
            )


def check_window(
    config: StageModelConfig, fields: Mapping[str, TokenField], batch: Mapping[str, Tensor], frames: int
) -> None:
    """Raises UserError unless `batch` holds what the stage needs for a window of `frames` frames of its target.

    The values of codes are looked at where they are in host memory only: on a GPU that would stop the queue.
    """
    target = fields[config.field]
    longest = target.frames(config.window_seconds)
    if not 0 < frames <= longest:
        raise UserError(
            f"a window of {frames} frames of field {target.name!r} was given; the stage was made for 1 to {longest} "
            f"(window_seconds={config.window_seconds:g} at {target.rate_hz:g} Hz)."
        )
    for name in dict.fromkeys([config.field, *(condition.field for condition in config.conditions)]):
        if name in batch:
            _check_codes(fields[name], batch[name])
        elif name != config.field:  # while sampling, the target is what is made
            raise UserError(f"field {name!r} is missing: the stage needs it, and was given {', '.join(batch)}.")
    for condition in config.conditions:
        field, found = fields[condition.field], batch[condition.field].shape[1]
        # The frame that sounds with the last of the target, and one more where the rates do not meet.
        least = 1 if field.name == CONDITIONING else int((frames - 1) * field.rate / target.rate) + 1
        most = 1 if field.name == CONDITIONING else ceil(frames * field.rate / target.rate) + 1
        if not least <= found <= most:
            raise UserError(
                f"field {field.name!r} has {found} frames at {field.rate_hz:g} Hz beside {frames} frames of "
                f"{target.name!r} at {target.rate_hz:g} Hz, which take {least}: they must cover the same time."
            )


def _check_codes(field: TokenField, codes: Tensor) -> None:
    if codes.dim() != 3 or codes.shape[2] != field.quantizers:
        raise UserError(
            f"codes of field {field.name!r} have shape {list(codes.shape)}; "
            f"[batch, frames, {field.quantizers}] was expected."
        )
    if codes.is_cuda or codes.numel() == 0:
        return
    low, high = codes.aminmax()
    if low < 0 or high >= field.codebook_size:
        raise UserError(
            f"field {field.name!r} holds codes from {int(low)} to {int(high)}; "
            f"its codebook has 0 to {field.codebook_size - 1}."
        )
