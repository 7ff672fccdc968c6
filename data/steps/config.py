"""Typed configuration of the preprocessing steps (`tokens.steps` of a recipe). Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PositiveFloat, PositiveInt, Tag, field_validator, model_validator
from typing_extensions import Self

from model.config import Config

TAG = "kind="
OWN = f"{TAG}package.module:Class"
MFCC_MEL_BANDS = 40
"""Mel bands that cepstral coefficients are worked out from."""
PITCH_CLASSES = 12


class VocalsConfig(Config):
    """Takes the vocals out of the audio that everything after it hears."""

    kind: Literal["vocals"]
    model: str = Field("htdemucs", min_length=1)
    """A pretrained model of Demucs."""
    weights: str | None = None
    """Folder or file of its weights; Demucs' own cache when not given."""


class ClockedConfig(Config):
    """Something worked out at a constant rate."""

    sample_rate: PositiveInt = 16_000

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        rate: float = getattr(self, "rate_hz")  # noqa: B009 (each kind has a default of its own)
        if (self.sample_rate / Fraction(rate).limit_denominator(1_000_000)).denominator != 1:
            raise ValueError(f"sample_rate {self.sample_rate} must be a multiple of rate_hz {rate:g}")
        return self


class ChromaConfig(ClockedConfig):
    """Melody tokens: the strongest pitch class of each frame."""

    kind: Literal["chroma"]
    rate_hz: PositiveFloat = 10.0


class FeaturesConfig(ClockedConfig):
    """Plain spectral features, kept beside the tokens."""

    kind: Literal["features"]
    of: Literal["mel", "mfcc", "chroma"]
    rate_hz: PositiveFloat = 50.0
    bands: PositiveInt | None = None
    """Mel bands (80 when not given) or cepstral coefficients (20); chroma always has 12."""

    @model_validator(mode="after")
    def _check_bands(self) -> Self:
        if self.of == "mfcc" and (self.bands or 0) > MFCC_MEL_BANDS:
            raise ValueError(f"bands {self.bands} must be at most {MFCC_MEL_BANDS} where mfcc are asked for")
        if self.of == "chroma" and self.bands not in (None, PITCH_CLASSES):
            raise ValueError(f"bands is {self.bands}, but chroma has always {PITCH_CLASSES}: leave it out")
        return self


class CaptionsConfig(Config):
    """Rewrites the captions by templates."""

    kind: Literal["captions"]
    templates: list[str] = Field(min_length=1)
    """Such as "{genre} music: {caption}"; {caption} is the clip's own, other names are columns of the manifest."""

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: list[str]) -> list[str]:
        for template in templates:
            try:
                parts = list(Formatter().parse(template))
            except ValueError as error:
                raise ValueError(f"{template!r} is no template: {str(error).lower()}") from None
            if any(name == "" or form or conversion for _, name, form, conversion in parts):
                raise ValueError(f"{template!r} is no template: between braces there is nothing but a name")
        return templates


class OwnStepConfig(Config):
    """A step of the user's: a subclass of `data.steps.base.Step`, called with the other keys."""

    model_config = ConfigDict(extra="allow")

    kind: str

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        module, _, name = kind.partition(":")
        if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"{kind!r} is not the name of a class, such as package.module:Class")
        return kind


def _tag(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if kind is None:
        return None
    return OWN if ":" in str(kind) else f"{TAG}{kind}"


StepConfig = Annotated[
    Annotated[VocalsConfig, Tag(f"{TAG}vocals")]
    | Annotated[ChromaConfig, Tag(f"{TAG}chroma")]
    | Annotated[FeaturesConfig, Tag(f"{TAG}features")]
    | Annotated[CaptionsConfig, Tag(f"{TAG}captions")]
    | Annotated[OwnStepConfig, Tag(OWN)],
    Discriminator(_tag),
]
