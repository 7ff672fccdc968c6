"""Clips → the vectors that quantizers are fitted to, read and encoded a batch at a time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.corpus import Clip, load_clip
from data.ranks import Ranks
from model.config import EncodersConfig
from model.encoders import load_joint_embedder, load_semantic_encoder
from model.encoders.base import embed_windows

BATCH_SECONDS = 80.0
"""Audio held and encoded at a time."""
READERS = 2
BATCHES_AHEAD = 2


class Encoding(Protocol):
    """What an encoder makes of clips, by kind."""

    kinds: tuple[str, ...]
    sample_rate: int
    dim: int

    def expected(self, clips: list[Clip]) -> int:
        """How many vectors, of all kinds, the clips will give."""
        ...

    def vectors(self, clips: list[Clip], waves: Tensor) -> dict[str, Tensor]:
        """Kind → float32 `[n, dim]` of clips and their waves `[clips, samples]`."""
        ...


class JointEmbeddings:
    """Joint embeddings of the clips' windows ("audio") and of their captions ("text")."""

    kinds: tuple[str, ...] = ("audio", "text")

    def __init__(self, embedding: Path, encoders: EncodersConfig) -> None:
        self.config = encoders.joint
        self.embedder = load_joint_embedder(embedding, self.config)
        self.sample_rate, self.dim = self.embedder.sample_rate, self.embedder.dim

    def expected(self, clips: list[Clip]) -> int:
        spare = (clip.seconds - self.config.window_seconds for clip in clips)
        windows = sum(1 + max(0, int(seconds / self.config.hop_seconds)) for seconds in spare)
        return windows + sum(len(clip.captions) for clip in clips)

    def vectors(self, clips: list[Clip], waves: Tensor) -> dict[str, Tensor]:
        captions = [caption for clip in clips for caption in clip.captions]
        text = self.embedder.embed_text(captions).cpu() if captions else torch.zeros(0, self.dim)
        return {"audio": embed_windows(self.embedder, waves, self.config).flatten(0, 1).cpu(), "text": text}


class SemanticFeatures:
    """The semantic features of every frame of the clips."""

    kinds: tuple[str, ...] = ("features",)

    def __init__(self, encoders: EncodersConfig) -> None:
        self.encoder = load_semantic_encoder(encoders.semantic)
        self.sample_rate, self.dim = self.encoder.sample_rate, self.encoder.dim

    def expected(self, clips: list[Clip]) -> int:
        return sum(int(clip.seconds * self.encoder.rate_hz) for clip in clips)

    def vectors(self, clips: list[Clip], waves: Tensor) -> dict[str, Tensor]:
        return {"features": self.encoder.features(waves).flatten(0, 1).cpu()}


def some(items: list, count: int, seed: int) -> list:
    """At most `count` of `items` drawn by `seed`, in their order."""
    if len(items) <= count:
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def read_waves(
    corpus: Path, clips: list[Clip], sample_rate: int, ranks: Ranks | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Batches of waves `[batch, samples]` in the order of `clips`, with how many clips are done after each.

    Batches are dealt to `ranks` in turn, and this one's are given. The next ones are read while one is worked on.
    Raises UserError for a file that has changed.
    """
    if not clips:
        return
    ranks = ranks or Ranks()
    size = max(1, int(BATCH_SECONDS / clips[0].seconds))
    starts = range(ranks.rank * size, len(clips), ranks.world_size * size)
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque = deque()
        for number in range(len(starts) + BATCHES_AHEAD):
            if number < len(starts):
                batch = clips[starts[number] :][:size]
                ahead.append([pool.submit(load_clip, corpus, clip, sample_rate) for clip in batch])
            if number >= BATCHES_AHEAD and ahead:
                waves = [future.result() for future in ahead.popleft()]
                yield starts[number - BATCHES_AHEAD] + len(waves), torch.from_numpy(np.stack(waves))
