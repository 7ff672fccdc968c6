"""What every encoder is, whichever weights it has.

Waveforms are float32 in [-1, 1], `[batch, samples]`, or `[batch, 2, samples]` for a codec of two channels, and have any
length: encoders do long ones in pieces of bounded memory. Frame t of anything at `rate` Hz describes the samples of
[t / rate, (t + 1) / rate): encoders centre their analysis windows on that interval and pad inside, so all of them run
on one clock and a wave of `seconds` gives floor(seconds × rate) frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import Self

from model.config import JointEmbedderConfig
from model.fields import TokenField


@runtime_checkable
class Codec(Protocol):
    """Waveform ↔ acoustic tokens."""

    sample_rate: int
    channels: int
    """1 for waves `[batch, samples]`, 2 for `[batch, 2, samples]`."""
    field: TokenField
    fitted: bool
    """Whether it is fitted in the run, and knows the sounds of its corpus alone."""

    def encode(self, wave: Tensor) -> Tensor:
        """Codes int64 `[batch, frames, quantizers]` of `wave`; a last part frame is dropped."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """A wave of `frames × sample_rate / rate_hz` samples that sounds like `codes`."""
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
    fitted: bool
    """Whether it is trained in the run, and knows the sounds and the words of its corpus alone."""

    def embed_audio(self, wave: Tensor) -> Tensor:
        """Unit vectors `[batch, dim]`, one for each whole wave."""
        ...

    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit vectors `[len(texts), dim]`."""
        ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, config: Any) -> Self: ...


WINDOWS = 64
"""Windows copied out of long waves at a time."""


def embed_windows(embedder: JointEmbedder, waves: Tensor, config: JointEmbedderConfig) -> Tensor:
    """Embeddings `[clips, windows, dim]` of `waves` `[clips, samples]`: one every `hop_seconds`, each of the
    `window_seconds` from there on, as many as fit; of a shorter clip the one of all of it.
    """
    window = min(round(config.window_seconds * embedder.sample_rate), waves.shape[1])
    hop = round(config.hop_seconds * embedder.sample_rate)
    cut = waves.unfold(1, window, hop)
    clips, windows = cut.shape[:2]
    parts = [
        embedder.embed_audio(cut[part // windows, part % windows])
        for part in torch.arange(clips * windows).split(WINDOWS)
    ]
    return torch.cat(parts).view(clips, windows, -1)


def with_channels(waves: Tensor, channels: int) -> Tensor:
    """`waves`, `[batch, samples]` or `[batch, 2, samples]`, as a codec of `channels` takes them: two are mixed to one,
    one is heard on both sides."""
    stereo = waves.ndim == 3
    if channels == 1:
        return waves.mean(1) if stereo else waves
    return waves if stereo else waves[:, None].expand(-1, channels, -1)


def within_full_scale(waves: Tensor) -> Tensor:
    """Decoded `waves` `[batch, …, samples]`, of which those that pass ±1 are made quieter as a whole: codes that a
    model made up often decode to peaks of 2 or 3, and cutting these off is heard as distortion."""
    return waves / waves.flatten(1).abs().amax(1).clamp_min(1).view(-1, *[1] * (waves.ndim - 1))
