"""Fits what is fitted rather than trained: the built-in codec's codebooks and the quantizers of the conditions.

Audio is read in batches and only a bounded sample of vectors is kept, whatever the size of the corpus.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.corpus import TRAIN, Clip, load_clip, read_clips
from data.progress import Progress
from model.config import CodecConfig, EncodersConfig, KMeansConfig, QuantizersConfig
from model.encoders import CODECS, encoder_class, load_joint_embedder, load_semantic_encoder
from model.encoders.base import embed_windows
from model.encoders.mel import MelCodec
from model.fields import CONDITIONING, SEMANTIC
from model.kmeans import ResidualKMeans

BATCH_SECONDS = 80.0
"""Audio held and encoded at a time."""
READERS = 2
BATCHES_AHEAD = 2
CODEC_ITERATIONS = 12
CODEC_VECTORS = 50_000
OVERSAMPLING = 2
"""Clips are read until there are this many times the vectors wanted, so that each gives a part of its vectors only."""


def fit_codec(corpus: Path, config: CodecConfig, seed: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """Fits the built-in codec to training clips and saves it in `folder`; of a pretrained one, a note is saved.

    Returns what the manifest says: the token field, and the share of the log-mel variance that is left after each
    level. Raises UserError for weights that cannot be used, or audio that has changed since the corpus was made.
    """
    if config.kind != "mel":
        codec = encoder_class(CODECS, config.kind)(config)
        codec.save(folder)
        return {"kind": config.kind, "field": codec.field.to_json()}
    codec = MelCodec(config)
    clips = some(read_clips(corpus, TRAIN), config.fit_clips, seed)

    def vectors() -> Iterator[Tensor]:
        # A corpus may hold no silence, yet generated music may: it gets a code of its own.
        yield codec.silence.expand(len(clips), -1)
        for done, waves in read_waves(corpus, clips, codec.sample_rate):
            yield codec.vectors(waves).flatten(0, 1)
            progress.update(done, 2 * len(clips), "reading")

    left = codec.quantizer.fit(
        vectors(),
        iterations=CODEC_ITERATIONS,
        max_vectors=CODEC_VECTORS,
        seed=seed,
        report=lambda done, total: progress.update(total + done, 2 * total, "fitting the codec"),
    )
    codec.save(folder)
    return {"kind": config.kind, "field": codec.field.to_json(), "variance_left": left, "clips": len(clips)}


def fit_quantizers(
    corpus: Path,
    embedding: Path,
    encoders: EncodersConfig,
    config: QuantizersConfig,
    seed: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Fits the residual k-means of the joint embeddings (of audio and captions) and of the semantic features.

    Writes `folder`/quantizers.safetensors with the centroids "conditioning" and "semantic" (`[levels, codebook_size,
    dim]`) and returns for each its shape and the share of the variance left after each level. `embedding` is the
    artifact of the joint embedder. Raises UserError for audio that has changed since the corpus was made.
    """
    clips = read_clips(corpus, TRAIN)
    parts = {
        CONDITIONING: (embeddings(corpus, clips, embedding, encoders, config.conditioning, seed), config.conditioning),
        SEMANTIC: (semantic_features(corpus, clips, encoders, config.semantic, seed), config.semantic),
    }
    centroids, info = {}, {}
    for order, (name, (vectors, kmeans)) in enumerate(parts.items()):

        def report(share: float, message: str, order: int = order) -> None:
            progress.update(round(1000 * (order + share)), 1000 * len(parts), message)

        quantizer, left = _fit(vectors, kmeans, seed, name, report)
        centroids[name] = quantizer.centroids
        info[name] = {
            "levels": quantizer.levels,
            "codebook_size": quantizer.codebook_size,
            "dim": quantizer.dim,
            "variance_left": left,
        }
    save_file(centroids, folder / "quantizers.safetensors")
    return info


def embeddings(
    corpus: Path, clips: list[Clip], embedding: Path, encoders: EncodersConfig, config: KMeansConfig, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """Embeddings `[n, dim]` of the clips' audio and captions, each batch with the share of the work that is done."""
    embedder = load_joint_embedder(embedding, encoders.joint)
    windows = max(1, 1 + int((clips[0].seconds - encoders.joint.window_seconds) / encoders.joint.hop_seconds))
    captions = sum(len(clip.captions) for clip in clips) / len(clips)
    clips = some(clips, _clips_for(config.fit_vectors, windows + captions), seed)
    before = 0
    for done, waves in read_waves(corpus, clips, embedder.sample_rate):
        vectors = [embed_windows(embedder, waves, encoders.joint).flatten(0, 1).cpu()]
        if texts := [caption for clip in clips[before:done] for caption in clip.captions]:
            vectors.append(embedder.embed_text(texts).cpu())
        before = done
        yield done / len(clips), torch.cat(vectors)


def semantic_features(
    corpus: Path, clips: list[Clip], encoders: EncodersConfig, config: KMeansConfig, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """Semantic features `[n, dim]` of the clips, each batch with the share of the work that is done."""
    encoder = load_semantic_encoder(encoders.semantic)
    clips = some(clips, _clips_for(config.fit_vectors, clips[0].seconds * encoder.rate_hz), seed)
    for done, waves in read_waves(corpus, clips, encoder.sample_rate):
        yield done / len(clips), encoder.features(waves).flatten(0, 1).cpu()


def _fit(
    vectors: Iterator[tuple[float, Tensor]],
    config: KMeansConfig,
    seed: int,
    name: str,
    report: Callable[[float, str], None],
) -> tuple[ResidualKMeans, list[float]]:
    """A residual k-means fitted to a stream of (share done, vectors); reading and fitting count for half each."""
    _, first = next(vectors)
    quantizer = ResidualKMeans(config.levels, config.codebook_size, first.shape[1])

    def stream() -> Iterator[Tensor]:
        yield first
        for share, batch in vectors:
            report(share / 2, f"reading for {name}")
            yield batch

    left = quantizer.fit(
        stream(),
        iterations=config.iterations,
        max_vectors=config.fit_vectors,
        seed=seed,
        report=lambda done, total: report(0.5 + done / total / 2, f"fitting {name}"),
    )
    return quantizer, left


def _clips_for(vectors: int, vectors_a_clip: float) -> int:
    return max(1, round(OVERSAMPLING * vectors / max(1.0, vectors_a_clip)))


def some(items: list, count: int, seed: int) -> list:
    """At most `count` of `items` drawn by `seed`, in their order."""
    if len(items) <= count:
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def read_waves(corpus: Path, clips: list[Clip], sample_rate: int) -> Iterator[tuple[int, Tensor]]:
    """Batches of waves `[batch, samples]` in the order of `clips`, with how many clips are done after each.

    The next batches are read while one is worked on. Raises UserError for a file that has changed.
    """
    size = max(1, int(BATCH_SECONDS / clips[0].seconds))
    batches = [clips[start : start + size] for start in range(0, len(clips), size)]
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque = deque()
        done = 0
        for number in range(len(batches) + BATCHES_AHEAD):
            if number < len(batches):
                ahead.append([pool.submit(load_clip, corpus, clip, sample_rate) for clip in batches[number]])
            if number >= BATCHES_AHEAD:
                waves = [future.result() for future in ahead.popleft()]
                done += len(waves)
                yield done, torch.from_numpy(np.stack(waves))
