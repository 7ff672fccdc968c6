"""Audio and captions → token shards: every frozen encoder runs once over each clip, and the stages never see audio."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import aligned_seconds
from data.corpus import TRAIN, VALIDATION, Clip, load_clip, read_clips
from data.progress import Progress
from data.shards import write_records
from model.config import EncodersConfig
from model.encoders import load_codec, load_joint_embedder, load_semantic_encoder
from model.encoders.base import embed_windows
from model.fields import CONDITIONING, SEMANTIC, TokenField
from model.kmeans import ResidualKMeans

BATCH_SECONDS = 80.0
"""Audio encoded at a time by one thread."""
MOST_THREADS = 8
BATCHES_AHEAD = 2
"""Finished batches that may wait to be written."""

Record = dict[str, Any]


def tokenise(
    corpus: Path,
    codec: Path,
    embedding: Path,
    quantizers: Path,
    encoders: EncodersConfig,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the training and validation clips of `corpus` as token shards `folder`/{train,validation}.

    `codec`, `embedding` and `quantizers` are the artifacts with the fitted parts. Returns what the manifest says: the
    token fields, lengths of the longest and of the shortest clip, length and hop of the embedding windows, records of
    each split. A clip shorter than the others is cut to whole frames of all fields. Clips of other splits are not
    written: they are for evaluation. Raises UserError when an audio file has changed since the corpus was made.
    """
    tokeniser = Tokeniser(corpus, codec, embedding, quantizers, encoders)
    full = read_clips(corpus, TRAIN)
    longest = full[0].seconds
    clips = {
        split: [tokeniser.aligned(clip, longest) for clip in read_clips(corpus, split, short=True)]
        for split in (TRAIN, VALIDATION)
    }
    total = sum(map(len, clips.values()))
    done = 0

    def records(split: str) -> Iterator[Record]:
        nonlocal done
        for batch in _over_threads(tokeniser.records, _batches(clips[split])):
            yield from batch
            done += len(batch)
            progress.update(done, total, "tokenising")

    counts = {split: write_records(folder / split, records(split)) for split in clips}
    return {
        "fields": {field.name: field.to_json() for field in tokeniser.fields},
        "clip_seconds": longest,
        "shortest_seconds": min(clip.seconds for split in clips.values() for clip in split),
        "hop_seconds": encoders.joint.hop_seconds,
        "embedding_seconds": encoders.joint.window_seconds,
        "records": counts,
        "captions": any(clip.captions for clip in full),
    }


class Tokeniser:
    """The frozen encoders and their quantizers, at work on a corpus."""

    def __init__(self, corpus: Path, codec: Path, embedding: Path, quantizers: Path, encoders: EncodersConfig) -> None:
        self.corpus = corpus
        self.codec = load_codec(codec, encoders.codec)
        self.semantic = load_semantic_encoder(encoders.semantic)
        self.joint = load_joint_embedder(embedding, encoders.joint)
        self.config = encoders.joint
        self.conditioning_codes = ResidualKMeans.load(quantizers / "quantizers.safetensors", CONDITIONING)
        self.semantic_codes = ResidualKMeans.load(quantizers / "quantizers.safetensors", SEMANTIC)

    @property
    def fields(self) -> list[TokenField]:
        conditioning, semantic = self.conditioning_codes, self.semantic_codes
        return [
            self.codec.field,
            TokenField(SEMANTIC, self.semantic.rate_hz, semantic.levels, semantic.codebook_size),
            TokenField(
                CONDITIONING, 1 / self.config.hop_seconds, conditioning.levels, conditioning.codebook_size
            ),
        ]  # fmt: skip

    def aligned(self, clip: Clip, longest: float) -> Clip:
        """`clip`, which where it is shorter than `longest` seconds ends with a frame of every field."""
        if clip.seconds == longest:
            return clip
        timed = [field for field in self.fields if field.name != CONDITIONING]
        return replace(clip, seconds=aligned_seconds(clip.seconds, timed))

    @torch.inference_mode()
    def records(self, clips: list[Clip]) -> list[Record]:
        """One record for each of some clips of equal length."""
        rates = {self.codec.sample_rate, self.semantic.sample_rate, self.joint.sample_rate}
        waves = {rate: _stack([load_clip(self.corpus, clip, rate) for clip in clips]) for rate in rates}
        acoustic = self.codec.encode(waves[self.codec.sample_rate])
        semantic = self.semantic_codes.encode(self.semantic.features(waves[self.semantic.sample_rate]).cpu())
        embeddings = embed_windows(self.joint, waves[self.joint.sample_rate], self.config)
        conditioning = self.conditioning_codes.encode(embeddings.cpu())
        for codes, field in ((acoustic, self.codec.field), (semantic, self.fields[1])):
            if codes.shape[1] != field.frames(clips[0].seconds):
                raise ValueError(f"the {field.name} encoder gave {codes.shape[1]} frames for {clips[0].seconds} s")
        text = self._text(clips)
        return [
            {
                "id": clip.id,
                "captions": json.dumps(clip.captions),
                "conditioning": _stored(conditioning[index]),
                "semantic": _stored(semantic[index]),
                "acoustic": _stored(acoustic[index]),
                "text_conditioning": _stored(text[index]),
            }
            for index, clip in enumerate(clips)
        ]

    def _text(self, clips: list[Clip]) -> list[Tensor]:
        """Codes `[captions, quantizers]` of each clip's captions."""
        captions = [caption for clip in clips for caption in clip.captions]
        levels = self.conditioning_codes.levels
        if not captions:
            return [torch.zeros(0, levels, dtype=torch.long)] * len(clips)
        codes = self.conditioning_codes.encode(self.joint.embed_text(captions).cpu())
        return list(codes.split([len(clip.captions) for clip in clips]))


def _stored(codes: Tensor) -> np.ndarray:
    return codes.cpu().numpy().astype(np.uint16)


def _stack(waves: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(waves))


def _batches(clips: list[Clip]) -> list[list[Clip]]:
    """Neighbours of one length together: padding would change what the encoders make of the real frames."""
    batches = []
    for seconds, group in groupby(clips, key=lambda clip: clip.seconds):
        alike, size = list(group), max(1, int(BATCH_SECONDS // seconds))
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    return batches


def _over_threads(function: Callable[[list[Clip]], list[Record]], batches: list[list[Clip]]) -> Iterator[list[Record]]:
    """Yields `function(batch)` for each batch in order, each worked out by one thread.

    One torch thread a batch and a batch a core is faster than all cores on one batch, whose threads wait for each other
    after every operation; and the codes do not depend on how many cores there are.
    """
    threads, before = min(os.cpu_count() or 1, MOST_THREADS), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[list[Record]]] = deque()
            for batch in batches:
                ahead.append(pool.submit(function, batch))
                if len(ahead) >= threads + BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        torch.set_num_threads(before)
