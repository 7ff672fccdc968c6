"""Fits what is fitted rather than trained: the built-in codec's codebooks and the quantizers of the conditions.

Audio is read in batches; the vectors made of it lie on the disk while they are fitted to, so that memory does not grow
with the corpus.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpus import TRAIN, VALIDATION, Clip, read_clips
from data.progress import Progress
from data.ranks import Ranks
from data.vector_file import VectorFile, check_room
from model.artifact import write_json
from model.bundle import QUANTIZERS
from model.config import CodecConfig, EncodersConfig, KMeansConfig, QuantizersConfig
from model.encoders import CODECS, encoder_class
from model.encoders.mel import MelCodec
from model.fields import CONDITIONING, SEMANTIC
from model.kmeans import ResidualKMeans
from model.saving import save_tensors
from trainer.encodings import Encoding, JointEmbeddings, SemanticFeatures, read_waves, some
from trainer.given_quantizers import find_given
from trainer.quantizer_report import measure

CODEC_ITERATIONS = 12
CODEC_VECTORS = 50_000
OVERSAMPLING = 2
"""Clips are read until there are this many times the vectors wanted, so that each gives a part of its vectors only."""
Batch = tuple[int, int, Tensor]
"""Places of the first clip and of that after the last, and the vectors `[n, dim]` of the clips between."""
REPORT_CLIPS = 256
"""Clips of each split that a fitted quantizer is measured on."""
READING, FITTING = 0.5, 0.4
"""Shares of the work on one quantizer, for the progress bar; the rest is measuring."""


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

    def batches() -> Iterator[Batch]:
        for done, waves in read_waves(corpus, clips, codec.sample_rate):
            yield done - len(waves), done, codec.vectors(waves).flatten(0, 1)
            progress.update(done, 2 * len(clips), "reading for the codec")

    limit = CODEC_VECTORS if sum(int(clip.seconds * config.frame_rate) for clip in clips) > CODEC_VECTORS else None
    with _spilled(batches(), len(clips), codec.dim, limit, seed, folder) as vectors:
        # A corpus may hold no silence, yet generated music may: it gets a code of its own.
        vectors.append(codec.silence.expand(len(clips), -1))
        left = codec.quantizer.fit(
            vectors,
            iterations=CODEC_ITERATIONS,
            seed=seed,
            report=lambda share: progress.update(round(1000 * (1 + share)), 2000, "fitting the codec"),
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
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Fits the residual k-means of the joint embeddings (of audio and captions) and of the semantic features, or takes
    what the recipe gives in place of them.

    All of `ranks` work together: each encodes its share of the clips and keeps what it made on the disk of `folder`
    while the fit lasts. The first one writes `folder`/quantizers.safetensors with the centroids "conditioning" and
    "semantic" (`[levels, codebook_size, dim]`), and `folder`/report.json with how well they do on clips of training and
    of validation. Returns for each quantizer, on every rank, its shape, how many vectors it was fitted to, the share of
    their variance left after each level (or what it was given from), and what the report says. `embedding` is the
    artifact of the joint embedder. Raises UserError for audio that has changed since the corpus was made, where the
    disk has too little room, and where a given quantizer does not fit the recipe.
    """
    ranks = ranks or Ranks()
    parts: dict[str, tuple[Callable[[], Encoding], KMeansConfig]] = {
        CONDITIONING: (lambda: JointEmbeddings(embedding, encoders), config.conditioning),
        SEMANTIC: (lambda: SemanticFeatures(encoders), config.semantic),
    }
    centroids, info = {}, {}
    for order, (name, (encoding_of, kmeans)) in enumerate(parts.items()):

        def report(share: float, message: str, order: int = order) -> None:
            if ranks.leads:
                progress.update(round(1000 * (order + share)), 1000 * len(parts), message)

        given = find_given(name, kmeans, encoders)
        encoding = encoding_of()
        if given is None:
            quantizer, fit = _fit_quantizer(name, corpus, encoding, kmeans, seed, folder, report, ranks)
        else:
            quantizer, fit = ResidualKMeans.load(given.path / QUANTIZERS, name), {"given": given.info[name]}
        report(READING + FITTING, f"measuring {name}")
        info[name] = {
            "levels": quantizer.levels,
            "codebook_size": quantizer.codebook_size,
            "dim": quantizer.dim,
            **fit,
            "measured": measure(corpus, _measured_clips(corpus, seed), encoding, quantizer, ranks),
        }
        if name == SEMANTIC:
            info[name]["standardised"] = encoders.semantic.standardise
        centroids[name] = quantizer.centroids
    if ranks.leads:
        save_tensors(centroids, folder / QUANTIZERS)
        write_json(folder / "report.json", {name: row["measured"] for name, row in info.items()})
    return info


def _measured_clips(corpus: Path, seed: int) -> dict[str, list[Clip]]:
    return {split: some(read_clips(corpus, split), REPORT_CLIPS, seed) for split in (TRAIN, VALIDATION)}


def _fit_quantizer(
    name: str,
    corpus: Path,
    encoding: Encoding,
    config: KMeansConfig,
    seed: int,
    folder: Path,
    report: Callable[[float, str], None],
    ranks: Ranks,
) -> tuple[ResidualKMeans, dict[str, Any]]:
    clips = read_clips(corpus, TRAIN)
    limit, expected = config.fit_vectors, encoding.expected(clips)
    if limit is not None and limit < expected:
        clips = some(clips, max(1, round(OVERSAMPLING * limit * len(clips) / expected)), seed)
        expected = encoding.expected(clips)
    limit = limit if limit is not None and limit < expected else None
    check_room(
        folder, limit or expected, encoding.dim, f"the fit of quantizers.{name}", f"quantizers.{name}.fit_vectors"
    )

    def batches() -> Iterator[Batch]:
        for done, waves in read_waves(corpus, clips, encoding.sample_rate, ranks):
            first = done - len(waves)
            yield first, done, torch.cat(list(encoding.vectors(clips[first:done], waves).values()))
            report(READING * done / len(clips), f"reading for {name}")

    quantizer = ResidualKMeans(config.levels, config.codebook_size, encoding.dim)
    with _spilled(batches(), len(clips), encoding.dim, limit, seed, folder) as vectors:
        left = quantizer.fit(
            vectors,
            iterations=config.iterations,
            start=config.start,
            seed=seed,
            group=ranks,
            report=lambda share: report(READING + FITTING * share, f"fitting {name}"),
        )
        fitted = int(ranks.sum_(torch.tensor(vectors.vectors)))
    return quantizer, {"vectors": fitted, "variance_left": left}


@contextlib.contextmanager
def _spilled(
    batches: Iterable[Batch], clips: int, dim: int, limit: int | None, seed: int, folder: Path
) -> Iterator[VectorFile]:
    """The vectors of batches of `clips` clips in a file on the disk of `folder`, which is gone with this process
    however that ends. With `limit` each batch gives its even share of so many, drawn by `seed` and by its place.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        vectors = VectorFile(file, dim)
        for first, done, batch in batches:
            count = len(batch) if limit is None else done * limit // clips - first * limit // clips
            if count < len(batch):
                rows = np.random.default_rng((seed, first)).permutation(len(batch))[:count]
                batch = batch[np.sort(rows)]
            vectors.append(batch)
        yield vectors
