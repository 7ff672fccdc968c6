"""The frozen encoders and their quantizers at work: audio and captions of some clips → records of codes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import aligned_seconds
from data.corpus import Clip
from data.shard_writer import COLUMNS, Record
from data.steps.base import Step
from data.waves import Kind, Waves
from model.config import EncodersConfig
from model.encoders import load_codec, load_joint_embedder, load_semantic_encoder
from model.encoders.base import embed_windows
from model.errors import UserError
from model.fields import CONDITIONING, SEMANTIC, TokenField
from model.kmeans import ResidualKMeans


class Tokeniser:
    """Encodes clips; several threads may do so at once."""

    def __init__(
        self, codec: Path, embedding: Path, quantizers: Path, encoders: EncodersConfig, steps: Sequence[Step] = ()
    ) -> None:
        """`codec`, `embedding` and `quantizers` are the artifacts with the fitted parts; `steps` come before encoding.

        Raises UserError where two steps make the same column.
        """
        self.codec = load_codec(codec, encoders.codec)
        self.semantic = load_semantic_encoder(encoders.semantic)
        self.joint = load_joint_embedder(embedding, encoders.joint)
        self.config = encoders.joint
        self.conditioning_codes = ResidualKMeans.load(quantizers / "quantizers.safetensors", CONDITIONING)
        self.semantic_codes = ResidualKMeans.load(quantizers / "quantizers.safetensors", SEMANTIC)
        self.steps = steps
        self.columns = dict(COLUMNS)
        """What the records hold, and how MDS stores it."""
        for step in steps:
            twice = self.columns.keys() & step.columns.keys()
            if twice:
                raise UserError(f"tokens.steps: two steps make the column {min(twice)}: leave one of them out.")
            self.columns |= step.columns
        self._clock = Lock()
        self.encoding_seconds = 0.0
        """Spent in the encoders and the steps so far, by all threads together."""

    @property
    def kinds(self) -> list[Kind]:
        """The audio that is needed of each clip."""
        return [*self.encoder_kinds, *(kind for step in self.steps for kind in step.kinds)]

    @property
    def encoder_kinds(self) -> list[Kind]:
        """What the codec, the semantic encoder and the joint embedder hear."""
        return [
            (self.codec.sample_rate, self.codec.channels),
            (self.semantic.sample_rate, 1),
            (self.joint.sample_rate, 1),
        ]

    @property
    def fields(self) -> list[TokenField]:
        """All that the records hold."""
        return [*self.encoder_fields, *(field for step in self.steps for field in step.fields)]

    @property
    def encoder_fields(self) -> list[TokenField]:
        conditioning, semantic = self.conditioning_codes, self.semantic_codes
        return [
            self.codec.field,
            TokenField(SEMANTIC, self.semantic.rate_hz, semantic.levels, semantic.codebook_size),
            TokenField(CONDITIONING, 1 / self.config.hop_seconds, conditioning.levels, conditioning.codebook_size),
        ]

    def aligned(self, clip: Clip, longest: float) -> Clip:
        """`clip`, which where it is shorter than `longest` seconds ends with a frame of every encoder's field."""
        if clip.seconds == longest:
            return clip
        timed = [field for field in self.encoder_fields if field.name != CONDITIONING]
        return replace(clip, seconds=aligned_seconds(clip.seconds, timed))

    @torch.inference_mode()
    def records(self, batch: Waves) -> list[Record]:
        """One record for each clip of a batch."""
        if not batch.clips:
            return []
        started = time.perf_counter()
        batch, added = self._after_steps(batch)
        codec, semantic, joint = (batch.waves[kind] for kind in self.encoder_kinds)
        acoustic = self.codec.encode(codec).cpu()
        features = self.semantic_codes.encode(self.semantic.features(semantic).cpu())
        conditioning = self.conditioning_codes.encode(embed_windows(self.joint, joint, self.config).cpu())
        for codes, field in zip((acoustic, features), self.encoder_fields, strict=False):
            _check(codes, field, batch.clips[0].seconds)
        text = self._text(batch.clips)
        with self._clock:
            self.encoding_seconds += time.perf_counter() - started
        return [
            {
                "id": clip.id,
                "captions": json.dumps(clip.captions),
                "conditioning": _stored(conditioning[index]),
                "semantic": _stored(features[index]),
                "acoustic": _stored(acoustic[index]),
                "text_conditioning": _stored(text[index]),
                **{column: values[index] for column, values in added.items()},
            }
            for index, clip in enumerate(batch.clips)
        ]

    def _after_steps(self, batch: Waves) -> tuple[Waves, dict[str, Sequence[Any]]]:
        """What the encoders hear, and what the steps add to the records."""
        added: dict[str, Sequence[Any]] = {}
        for step in self.steps:
            batch = replace(batch, waves=step.audio(batch.waves))
            made = step.arrays(batch)
            for field in step.fields:
                codes = torch.from_numpy(np.stack(made[field.name]).astype(np.int64))
                _check(codes.view(*codes.shape[:2], -1), field, batch.clips[0].seconds)
            added |= made
        return batch, added

    def _text(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Codes `[captions, quantizers]` of each clip's captions."""
        captions = [caption for clip in clips for caption in clip.captions]
        levels = self.conditioning_codes.levels
        if not captions:
            return [torch.zeros(0, levels, dtype=torch.long)] * len(clips)
        codes = self.conditioning_codes.encode(self.joint.embed_text(captions).cpu())
        return list(codes.split([len(clip.captions) for clip in clips]))


def _check(codes: Tensor, field: TokenField, seconds: float) -> None:
    """Raises ValueError unless `codes` are what `field` says of a clip of `seconds`: shards are for ever."""
    if codes.shape[1:] != (field.frames(seconds), field.quantizers):
        raise ValueError(f"the {field.name} encoder gave {list(codes.shape[1:])} for {seconds} s of {field}")
    if not (codes.min() >= 0 and codes.max() < field.codebook_size):
        raise ValueError(f"the {field.name} encoder gave codes from {codes.min()} to {codes.max()} for {field}")


def _stored(codes: Tensor) -> np.ndarray:
    return codes.numpy().astype(np.uint16)
