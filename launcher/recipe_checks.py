"""What the parts of a recipe must agree on with each other: checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import ds_configs
from model.config import STAGES, ConditionConfig, StageModelConfig
from model.counting import quantizers_used, token_fields
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField

if TYPE_CHECKING:
    from launcher.recipe import Recipe

PREDICTS = {"semantic": SEMANTIC, "coarse": ACOUSTIC, "fine": ACOUSTIC}
KNOWS = {
    "semantic": (CONDITIONING,),
    "coarse": (CONDITIONING, SEMANTIC),
    "fine": (CONDITIONING, SEMANTIC, ACOUSTIC),
}
"""The fields that exist by the time a stage makes music."""


def check(recipe: Recipe) -> list[str]:
    """Every disagreement, in plain lines that name the keys; none when the recipe can be run."""
    return [*_data(recipe), *_rates(recipe), *_stages(recipe)]


def _data(recipe: Recipe) -> Iterator[str]:
    if recipe.data.captions is not None and recipe.data.audio is None:
        yield "data.captions is set but data.audio is not: set data.audio to the folder they describe."


def _rates(recipe: Recipe) -> Iterator[str]:
    for name in ("codec", "semantic"):
        encoder = getattr(recipe.encoders, name)
        if encoder.sample_rate % encoder.frame_rate:
            yield (
                f"encoders.{name}.sample_rate {encoder.sample_rate} must be a multiple of its "
                f"frame_rate {encoder.frame_rate}."
            )


def _stages(recipe: Recipe) -> Iterator[str]:
    fields = token_fields(recipe.encoders, recipe.quantizers)
    for name in STAGES:
        stage = getattr(recipe.stages, name)
        key = f"stages.{name}"
        try:
            if ds_configs.zero_stage(stage.train.zero) == 3 and stage.train.compile == "on":
                yield f"{key}.train.compile is on, which zero: {stage.train.zero} (ZeRO-3) cannot be: set it to auto."
        except UserError as error:
            yield f"{key}.train.zero: {error}"
        yield from _window(f"{key}.model", stage.model, fields, recipe.data.clip_seconds)
        yield from _fields(f"{key}.model", name, stage.model, fields)
    yield from _split(recipe.stages.coarse.model, recipe.stages.fine.model, fields)


def _window(key: str, model: StageModelConfig, fields: Mapping[str, TokenField], clip_seconds: float) -> Iterator[str]:
    window = model.window_seconds
    if window > clip_seconds:
        yield f"{key}.window_seconds is {window:g}: it must be at most data.clip_seconds, {clip_seconds:g}."
    for name in dict.fromkeys([model.field, *(part.field for part in model.conditions)]):
        frames = Fraction(window).limit_denominator(1_000_000) * fields[name].rate
        # One embedding describes the whole window, however long it is.
        if name != CONDITIONING and frames.denominator != 1:
            yield (
                f"{key}.window_seconds is {window:g}: it must be a whole number of {name} frames, "
                f"of which there are {fields[name].rate_hz:g} a second."
            )


def _fields(key: str, stage: str, model: StageModelConfig, fields: Mapping[str, TokenField]) -> Iterator[str]:
    if model.field != PREDICTS[stage]:
        yield f"{key}.field is {model.field!r}: the {stage} stage predicts {PREDICTS[stage]!r}."
        return
    yield from _range(key, model, fields)
    for index, condition in enumerate(model.conditions):
        own = f"{key}.conditions.{index}"
        if condition.field not in KNOWS[stage]:
            known = " or ".join(map(repr, KNOWS[stage]))
            yield f"{own}.field is {condition.field!r}: the {stage} stage can be conditioned on {known}."
            continue
        yield from _range(own, condition, fields)
        if "summed" in condition.paths and condition.field == ACOUSTIC:
            yield f"{own}.paths: acoustic codes have no centroids to sum; choose 'prefix' or 'aligned'."


def _range(key: str, part: StageModelConfig | ConditionConfig, fields: Mapping[str, TokenField]) -> Iterator[str]:
    available, used = fields[part.field].quantizers, quantizers_used(part, fields)
    if not 0 <= used.start < used.stop <= available:
        yield (
            f"{key} takes quantizers {used.start} up to {used.stop} of {part.field}, which has {available}: "
            f"choose 0 ≤ first < last ≤ {available}."
        )


def _split(coarse: StageModelConfig, fine: StageModelConfig, fields: Mapping[str, TokenField]) -> Iterator[str]:
    """Coarse and fine together must predict every quantizer of the codec once, and fine may read only coarse's."""
    if coarse.field != ACOUSTIC or fine.field != ACOUSTIC:
        return
    available = fields[ACOUSTIC].quantizers
    first, second = quantizers_used(coarse, fields), quantizers_used(fine, fields)
    if (first.start, first.stop, second.stop) != (0, second.start, available):
        yield (
            f"stages.coarse.model predicts quantizers {first.start} up to {first.stop} and stages.fine.model "
            f"{second.start} up to {second.stop}: together they must cover 0 up to {available} without gap or overlap."
        )
        return
    for index, condition in enumerate(fine.conditions):
        if condition.field == ACOUSTIC and quantizers_used(condition, fields).stop > first.stop:
            yield (
                f"stages.fine.model.conditions.{index} reads acoustic quantizers up to "
                f"{quantizers_used(condition, fields).stop}, but the coarse stage makes only {first.stop}: "
                f"set its last to {first.stop}."
            )
