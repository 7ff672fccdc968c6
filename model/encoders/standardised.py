"""Semantic features brought to one scale each, as open-musiclm has them before its k-means."""

from __future__ import annotations

from torch import Tensor

from model.encoders.base import SemanticEncoder

EPSILON = 1e-7


class Standardised:
    """The features of another encoder, each with mean 0 and variance 1 (of n - 1) over its numbers."""

    def __init__(self, encoder: SemanticEncoder) -> None:
        self.encoder = encoder
        self.sample_rate, self.rate_hz, self.dim = encoder.sample_rate, encoder.rate_hz, encoder.dim

    def features(self, wave: Tensor) -> Tensor:
        """Float32 `[batch, floor(seconds × rate_hz), dim]`."""
        features = self.encoder.features(wave)
        centred = features - features.mean(-1, keepdim=True)
        return centred / (features.var(-1, keepdim=True) + EPSILON).sqrt()
