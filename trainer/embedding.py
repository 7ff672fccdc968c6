"""Trains the built-in joint embedding: audio and captions by contrast, or audio alone where there are no captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.corpus import TRAIN, VALIDATION, Clip, read_clips
from data.progress import Progress
from model.config import JointEmbedderConfig
from model.encoders import JOINT_EMBEDDERS, encoder_class
from model.encoders.towers import BANDS, MEL_HZ, TwoTowers, fit_tokenizer
from trainer.encodings import read_waves, some

FEATURE_BYTES = 512 << 20
"""Most memory the spectra of the training clips may take; of a larger corpus a sample of clips is used."""
READING_SHARE = 0.25
"""What reading counts for in the progress, beside the steps."""
WARMUP_STEPS = 40
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
LARGEST_SCALE = 100.0
"""Bound of the learnt inverse temperature."""
SHORTEST_VIEW = 0.5
"""A view of a window is at least this share of it."""
LOSS_STEPS = 20
"""The loss that is reported is the mean of so many steps."""
VALIDATION_CLIPS = 512


@dataclass(frozen=True)
class Examples:
    """Clips with what the audio tower sees of each: float16 `[clips, frames, BANDS]`."""

    clips: list[Clip]
    features: Tensor


def train_embedder(
    corpus: Path, config: JointEmbedderConfig, seed: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Trains the two towers on the training clips of `corpus` and saves them in `folder`.

    Clips with captions are contrasted with one of theirs at random, as in CLIP (Radford et al. 2021). Where clips lack
    captions, two views of each are contrasted too; where all do, the text tower stays as it began and prompts mean
    nothing. Pretrained embedders are not trained; a note of their weights is saved.

    Returns what the manifest says: whether it was trained, and on captions, the last loss, and how well validation
    clips find their caption. Raises UserError for weights that cannot be used, or for audio that has changed.
    """
    if config.kind != "towers":
        encoder_class(JOINT_EMBEDDERS, config.kind)(config).save(folder)
        return {"kind": config.kind, "dim": config.dim, "trained": False, "captions": True}
    clips = read_clips(corpus, TRAIN)
    torch.manual_seed(seed)
    tokenizer = fit_tokenizer((caption for clip in clips for caption in clip.captions), config.vocabulary)
    towers = TwoTowers(config, tokenizer)
    reading = round(READING_SHARE * config.steps)

    def report(done: int, total: int) -> None:
        progress.update(reading * done // total, reading + config.steps, "reading")

    trainer = Trainer(towers, _examples(corpus, clips, towers, seed, report), config, seed)
    for step, loss in enumerate(trainer.steps(), start=1):
        progress.update(reading + step, reading + config.steps, "training the joint embedding", loss=loss)
    towers.cpu().eval().save(folder)
    checked = some(read_clips(corpus, VALIDATION), VALIDATION_CLIPS, seed)
    return {
        "kind": config.kind,
        "dim": config.dim,
        "trained": True,
        "captions": trainer.captions,
        "clips": len(trainer.examples.clips),
        "steps": config.steps,
        "loss": loss,
        "vocabulary": tokenizer.get_vocab_size(),
        "retrieval": retrieval(towers, _examples(corpus, checked, towers, seed), trainer.window),
    }


class Trainer:
    """The contrastive training of two towers on examples; on the GPU where there is one."""

    def __init__(self, towers: TwoTowers, examples: Examples, config: JointEmbedderConfig, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.towers = towers.to(self.device).train()
        self.examples = examples
        self.config = config
        self.window = min(examples.features.shape[1], round(config.window_seconds * MEL_HZ))
        self.captions = any(clip.captions for clip in examples.clips)
        self.views = not all(clip.captions for clip in examples.clips)
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(towers.parameters(), config.learning_rate, BETAS, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def steps(self) -> Iterator[float]:
        """Takes the configured steps and yields the mean loss of the last few after each."""
        losses: list[float] = []
        order = torch.empty(0, dtype=torch.long)
        batch = min(self.config.batch, len(self.examples.clips))
        for _ in range(self.config.steps):
            if len(order) < batch:
                order = torch.randperm(len(self.examples.clips), generator=self.random)
            loss = self.loss(order[:batch].tolist())
            order = order[batch:]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses = [*losses[1 - LOSS_STEPS :], loss.item()]
            yield sum(losses) / len(losses)

    def loss(self, rows: list[int]) -> Tensor:
        """The contrast of the audio of `rows` with captions, of its views with each other, or both."""
        clips = [self.examples.clips[row] for row in rows]
        captioned = [index for index, clip in enumerate(clips) if clip.captions]
        texts = [clips[index].captions[self._below(len(clips[index].captions))] for index in captioned]
        total = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            audio = self.towers.audio(self._cut(rows, self._view() if self.views else self.window))
            if self.views:
                total = total + self._contrast(audio, self.towers.audio(self._cut(rows, self._view())))
            if captioned:
                text = self.towers.text(self.towers.tokens(texts))
                total = total + self._contrast(audio[captioned], text)
        return total

    def _contrast(self, one: Tensor, other: Tensor) -> Tensor:
        """Symmetric cross-entropy of finding row i of `other` from row i of `one` among all rows, and back."""
        similar = self.towers.scale.exp().clamp_max(LARGEST_SCALE) * one.float() @ other.float().T
        right = torch.arange(len(one), device=self.device)
        return (F.cross_entropy(similar, right) + F.cross_entropy(similar.T, right)) / 2

    def _cut(self, rows: list[int], frames: int) -> Tensor:
        """`frames` of each of `rows` from anywhere: float32 `[rows, frames, BANDS]`."""
        features = self.examples.features
        starts = [self._below(features.shape[1] - frames + 1) for _ in rows]
        cut = [features[row, start : start + frames].float() for row, start in zip(rows, starts, strict=True)]
        return torch.stack(cut).to(self.device)

    def _view(self) -> int:
        """Frames of a view."""
        shortest = max(1, round(SHORTEST_VIEW * self.window))
        return shortest + self._below(self.window - shortest + 1)

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self.random))

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero: the share of the learning rate at `step`."""
        warm = min(1.0, (step + 1) / min(WARMUP_STEPS, self.config.steps))
        return warm * (1 + math.cos(math.pi * step / self.config.steps)) / 2


@torch.no_grad()
def retrieval(towers: TwoTowers, examples: Examples, window: int) -> dict[str, float]:
    """How well the first `window` frames of clips find their own first caption (or, without captions, their last half
    the first half) among those of the others. Clips that sound alike share captions in all but words, so the share
    found at once stays below 1 in the best of embeddings.
    """
    rows = [row for row, clip in enumerate(examples.clips) if clip.captions]
    features = examples.features.float()
    if rows:
        one = towers.audio(features[rows, :window])
        other = towers.embed_text([examples.clips[row].captions[0] for row in rows])
    else:
        half = max(1, features.shape[1] // 2)
        one, other = towers.audio(features[:, :half]), towers.audio(features[:, -half:])
    similar = one @ other.T
    own = similar.diagonal()
    rank = (similar > own[:, None]).sum(1)
    others = (similar.sum() - own.sum()) / max(1, similar.numel() - len(own))
    return {
        "clips": len(own),
        "found_first": float((rank == 0).float().mean()),
        "found_in_ten": float((rank < 10).float().mean()),
        "cosine_of_own": float(own.mean()),
        "cosine_of_others": float(others),
    }


def _examples(
    corpus: Path,
    clips: list[Clip],
    towers: TwoTowers,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Examples:
    """The features of clips, or of as many drawn by `seed` as the memory set aside holds."""
    frames = int(clips[0].seconds * MEL_HZ)
    clips = some(clips, max(1, FEATURE_BYTES // (2 * frames * BANDS)), seed)
    features = torch.empty(len(clips), frames, BANDS, dtype=torch.float16)
    first = 0
    for done, waves in read_waves(corpus, clips, towers.sample_rate):
        features[first:done] = towers.features(waves)[:, :frames]
        report(first := done, len(clips))
    return Examples(clips, features)
