"""What the parts of a recipe must agree on with each other: checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import ds_configs
from data.config import aligned_seconds
from model.config import STAGES, ConditionConfig, StageModelConfig
from model.counting import quantizers_used, token_fields
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField, common_period
from trainer.config import StageConfig, TrainConfig
from trainer.deepspeed_settings import check_deepspeed

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
    return [*_data(recipe), *_caches(recipe), *_rates(recipe), *_stages(recipe), *_slurm(recipe)]


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.captions is not None and data.audio is None:
        yield "data.captions is set but data.audio is not: set data.audio to the folder they describe."
    if data.captions is not None and data.format not in ("auto", "folder"):
        yield f"data.captions goes with a folder of files, not with data.format={data.format}: leave it out."
    if data.validation + data.test >= 1:
        yield f"data.validation {data.validation:g} and data.test {data.test:g} leave nothing to train on: lower them."
    if data.split_by is not None and data.audio is None:
        yield "data.split_by is set but data.audio is not: the built-in corpus has no columns."
    if data.shortest_seconds is None:
        return
    if data.audio is None:
        yield "data.shortest_seconds is set but data.audio is not: clips of the built-in corpus have data.clip_seconds."
    if data.shortest_seconds > data.clip_seconds:
        yield (
            f"data.shortest_seconds is {data.shortest_seconds:g}: it must be at most data.clip_seconds, "
            f"{data.clip_seconds:g}."
        )
    timed = _timed(token_fields(recipe.encoders, recipe.quantizers))
    if not aligned_seconds(data.shortest_seconds, timed):
        yield (
            f"data.shortest_seconds is {data.shortest_seconds:g}: it must be at least "
            f"{float(common_period(timed)):g}, the time that is a whole number of frames of all fields."
        )


def _caches(recipe: Recipe) -> Iterator[str]:
    cached = recipe.tokens.upload is not None or recipe.tokens.compression is not None
    for name in STAGES:
        train = getattr(recipe.stages, name).train
        # Of tokens that are mixed in only their manifest tells: the stage looks before it starts.
        if train.cache_limit is not None and not cached and not train.mix:
            yield (
                f"stages.{name}.train.cache_limit is set, but the token shards lie in the run folder, the only copy "
                "there is, and are read in place: set tokens.upload, or leave the limit out."
            )


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
        yield from _compiled(f"{key}.train", stage.train)
        yield from _window(f"{key}.model", stage.model, fields, recipe.data.clip_seconds)
        yield from _short_clips(key, stage, fields, recipe.data.shortest_seconds)
        yield from _fields(f"{key}.model", name, stage.model, fields)
    yield from _split(recipe.stages.coarse.model, recipe.stages.fine.model, fields)


def _compiled(key: str, train: TrainConfig) -> Iterator[str]:
    if train.packing and train.compile == "on":
        yield f"{key}.compile is on, which packing does not go with, as lengths change each step: set it to auto."
    try:
        check_deepspeed(train, train.ranks)
        if ds_configs.zero_stage(train.zero) == 3 and train.compile == "on":
            yield f"{key}.compile is on, which zero: {train.zero} (ZeRO-3) cannot be: set it to auto."
    except UserError as error:
        yield f"{key}.zero: {error}"


def _short_clips(
    key: str, stage: StageConfig, fields: Mapping[str, TokenField], shortest_seconds: float | None
) -> Iterator[str]:
    """Windows that some clips are too short for go with packing alone."""
    if shortest_seconds is None or stage.train.packing:
        return
    if aligned_seconds(shortest_seconds, _timed(fields)) < stage.model.window_seconds:
        yield (
            f"{key}.model.window_seconds is {stage.model.window_seconds:g} and data.shortest_seconds "
            f"{shortest_seconds:g}: windows of different lengths need {key}.train.packing=true."
        )


def _timed(fields: Mapping[str, TokenField]) -> list[TokenField]:
    """The fields that run with the clock of a clip; the conditioning describes a window as a whole."""
    return [field for name, field in fields.items() if name != CONDITIONING]


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


def _slurm(recipe: Recipe) -> Iterator[str]:
    from launcher.graph import stage_named  # which reads recipes itself

    for name in recipe.slurm.stages:
        try:
            stage_named(name)
        except UserError as error:
            yield f"slurm.stages: {error}"
