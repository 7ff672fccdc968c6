"""What a run reads and writes outside of its folder, looked at before anything starts and not when it is needed, hours
later. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data import cloud
from data.token_corpus import artifact_manifest, disagreements
from launcher.graph import Origin
from launcher.recipe import Recipe
from launcher.stage import Stage
from model.config import STAGES as TRAINED
from model.counting import token_fields
from model.errors import UserError
from trainer.config import MixConfig


def check_places(recipe: Recipe, found: Mapping[str, Origin], todo: Sequence[Stage]) -> None:
    """Raises UserError with all that is wrong with the places that the stages `todo` will need, whose origins are
    `found`: buckets out of reach, and tokens that cannot be mixed with the run's own."""
    names = {stage.name for stage in todo}
    written = {"tokens.upload": recipe.tokens.upload if "tokens" in names else None}
    mixed: dict[str, list[MixConfig]] = {}
    for name in TRAINED:
        if name in names:
            train = getattr(recipe.stages, name).train
            written[f"stages.{name}.train.upload"] = train.upload
            mixed[f"stages.{name}.train.mix"] = train.mix
    problems = [*_buckets(written), *_mixed(recipe, found, mixed)]
    if problems:
        raise UserError("\n".join(problems))


def _buckets(written: Mapping[str, str | None]) -> Iterator[str]:
    """Addresses that will be written to, by their keys."""
    for key, address in written.items():
        if address is None:
            continue
        try:
            next(cloud.objects(f"{address}/"), None)
        except UserError as error:
            yield f"{key}: {error}"


def _mixed(recipe: Recipe, found: Mapping[str, Origin], mixed: Mapping[str, list[MixConfig]]) -> Iterator[str]:
    """The trainer compares the artifacts themselves once the run's own is there."""
    for key, others in mixed.items():
        for other in others:
            address, manifest = artifact_manifest(other.tokens)
            where = f"the tokens of this run and {address} cannot be mixed ({key})"
            yield from disagreements(_own(recipe, found["tokens"]), manifest, where)


def _own(recipe: Recipe, origin: Origin) -> dict[str, Any]:
    """What the manifest of the run's own tokens will say that others are compared by."""
    joint = recipe.encoders.joint
    fields = token_fields(recipe.encoders, recipe.quantizers)
    info = {
        "fields": {name: field.to_json() for name, field in fields.items()},
        "hop_seconds": joint.hop_seconds,
        "embedding_seconds": joint.window_seconds,
    }
    return {"fingerprint": origin.fingerprint, "inputs": origin.inputs, "info": info}
