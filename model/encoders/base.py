"""What every encoder is, whichever weights it has.

Waveforms are mono float32 in [-1, 1], `[batch, samples]`. Frame t of anything at `rate` Hz describes the samples of
[t / rate, (t + 1) / rate): encoders centre their analysis windows on that interval and pad inside, so all of them run
on one clock and a wave of `seconds` gives floor(seconds × rate) frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import Self

from model.config import JointEmbedderConfig
from model.fields import TokenField


@runtime_checkable
class Codec(Protocol):
    """Waveform ↔ acoustic tokens."""

    sample_rate: int
    field: TokenField

    def encode(self, wave: Tensor) -> Tensor:
        """Codes int64 `[batch, frames, quantizers]` of `wave`; a last part frame is dropped."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """A wave `[batch, frames × sample_rate / rate_hz]` that sounds like `codes`."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `load` needs besides the configuration; pretrained weights are not copied."""
        ...

    @classmethod
    def load(cls, folder: Path, config: Any) -> Self: ...


@runtime_checkable
class SemanticEncoder(Protocol):
    """Waveform → features that say what is played rather than how each sample sounds."""

    sample_rate: int
    rate_hz: float
    dim: int

    def features(self, wave: Tensor) -> Tensor:
        """Float32 `[batch, floor(seconds × rate_hz), dim]`."""
        ...


@runtime_checkable
class JointEmbedder(Protocol):
    """Audio and text → one space, where a clip and words that describe it lie close."""

    sample_rate: int
    dim: int

    def embed_audio(self, wave: Tensor) -> Tensor:
        """Unit vectors `[batch, dim]`, one for each whole wave."""
        ...

    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit vectors `[len(texts), dim]`."""
        ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, config: Any) -> Self: ...


def embed_windows(embedder: JointEmbedder, waves: Tensor, config: JointEmbedderConfig) -> Tensor:
    """Embeddings `[clips, windows, dim]` of `waves` `[clips, samples]`: one every `hop_seconds`, each of the
    `window_seconds` from there on, as many as fit; of a shorter clip the one of all of it.
    """
    window = min(round(config.window_seconds * embedder.sample_rate), waves.shape[1])
    hop = round(config.hop_seconds * embedder.sample_rate)
    cut = waves.unfold(1, window, hop)
    return embedder.embed_audio(cut.reshape(-1, window)).view(*cut.shape[:2], -1)
