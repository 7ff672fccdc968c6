"""Quantizers that a recipe names in place of fitting its own, and whether they fit the rest of it."""

from __future__ import annotations

from pathlib import Path

from model import artifact
from model.config import EncodersConfig, KMeansConfig
from model.encoders import feature_dim
from model.errors import UserError
from model.fields import CONDITIONING

KIND = "quantizers"


def find_given(name: str, config: KMeansConfig, encoders: EncodersConfig) -> artifact.Artifact | None:
    """The quantizers that `quantizers.NAME.centroids` names, every byte looked at; None where it names none.

    Raises UserError where there are none, and where the recipe has other codes or vectors than they.
    """
    if config.centroids is None:
        return None
    key = f"quantizers.{name}"
    try:
        found = artifact.read(Path(config.centroids), KIND)
    except UserError as error:
        raise UserError(f"{key}.centroids: {error}") from None
    if wrong := artifact.problems(found):
        raise UserError(f"{key}.centroids: {wrong[0]}.")
    if name not in found.info:
        raise UserError(f"{key}.centroids: {found.path} holds no {name} quantizer. `stretto inspect` says what it has.")
    _check(name, key, config, encoders, found)
    return found


def _check(name: str, key: str, config: KMeansConfig, encoders: EncodersConfig, found: artifact.Artifact) -> None:
    said = found.info[name]
    for part, asked in (("levels", config.levels), ("codebook_size", config.codebook_size)):
        if asked != said[part]:
            raise UserError(f"{key}.{part} is {asked}, but that of {found.path} is {said[part]}: set it to that.")
    encoder = "joint" if name == CONDITIONING else "semantic"
    dim = encoders.joint.dim if name == CONDITIONING else feature_dim(encoders.semantic)
    if dim != said["dim"]:
        raise UserError(
            f"{key}.centroids: {found.path} quantizes vectors of {said['dim']} numbers, but encoders.{encoder} "
            f"({getattr(encoders, encoder).kind}) makes vectors of {dim}."
        )
    wanted = said.get("standardised", encoders.semantic.standardise)
    if name != CONDITIONING and wanted != encoders.semantic.standardise:
        raise UserError(
            f"encoders.semantic.standardise is {str(not wanted).lower()}, but the semantic quantizer in {found.path} "
            f"was fitted to features that are {'' if wanted else 'not '}standardised: set it to {str(wanted).lower()}."
        )
