"""The joint embedding on small corpora of tones: what it learns, with captions, without, and with a few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.corpus import TRAIN, VALIDATION, Clip, write_clips
from data.progress import Progress
from model.config import JointEmbedderConfig
from model.encoders.towers import TwoTowers
from model.errors import UserError
from trainer.embedding import train_embedder

RATE = 16_000
WORDS = {"low": ("a low tone", "deep sound"), "high": ("a high tone", "treble sound")}
CONFIG = JointEmbedderConfig(dim=16, width=64, vocabulary=100, steps=25, batch=16, window_seconds=1.0, hop_seconds=1.0)


def tone(kind: str, random: np.random.Generator, seconds: float = 1.0) -> np.ndarray:
    hz = random.uniform(100, 160) if kind == "low" else random.uniform(900, 1400)
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * hz * time) + 0.01 * random.standard_normal(len(time))).astype(np.float32)


def write_corpus(folder: Path, captioned: Callable[[int], bool], seconds: float = 1.0) -> Path:
    """32 training and 8 validation clips, low and high in turn."""
    random = np.random.default_rng(0)
    clips = []
    for index in range(40):
        kind = ("low", "high")[index % 2]
        soundfile.write(folder / f"{index}.wav", tone(kind, random, seconds), RATE)
        words = WORDS[kind] if captioned(index) else ()
        split = TRAIN if index < 32 else VALIDATION
        clips.append(Clip(str(index), f"{index}.wav", 0.0, seconds, words, split))
    write_clips(folder, clips)
    return folder


def train(tmp_path: Path, captioned: Callable[[int], bool], seconds: float = 1.0, **changes) -> tuple[TwoTowers, dict]:
    for name in ("corpus", "embedding"):
        (tmp_path / name).mkdir()
    corpus = write_corpus(tmp_path / "corpus", captioned, seconds)
    config = CONFIG.model_copy(update=changes)
    info = train_embedder(corpus, config, 0, tmp_path / "embedding", Progress(tmp_path / "progress.json"))
    return TwoTowers.load(tmp_path / "embedding", config), info


def heard(towers: TwoTowers, number: int = 10) -> list[torch.Tensor]:
    """Embeddings of new low and of new high tones."""
    random = np.random.default_rng(1)
    waves = {kind: np.stack([tone(kind, random) for _ in range(number)]) for kind in WORDS}
    return [towers.embed_audio(torch.from_numpy(wave)) for wave in waves.values()]


@pytest.mark.parametrize("captioned", [lambda index: True, lambda index: index % 3 == 0], ids=["all", "some"])
def test_words_find_what_they_describe(tmp_path, captioned):
    towers, info = train(tmp_path, captioned, steps=60)
    assert info["captions"]
    assert info["steps"] == 60
    low, high = heard(towers)
    words = towers.embed_text(["a low tone", "deep sound", "a high tone", "treble sound"])
    for audio, own, other in ((low, words[:2], words[2:]), (high, words[2:], words[:2])):
        assert ((audio @ own.T).mean(1) > (audio @ other.T).mean(1)).all()
    assert info["retrieval"]["cosine_of_own"] > info["retrieval"]["cosine_of_others"] + 0.1


def test_without_captions_like_sounds_still_lie_together(tmp_path):
    towers, info = train(tmp_path, lambda index: False)
    assert not info["captions"]
    low, high = heard(towers)
    assert (low @ low.T).mean() > (low @ high.T).mean() + 0.1
    assert towers.embed_text(["a low tone"]).isfinite().all()


def test_windows_shorter_than_the_clips(tmp_path):
    towers, info = train(tmp_path, lambda index: True, seconds=2.5, steps=3)
    assert info["clips"] == 32
    assert towers.embed_audio(torch.zeros(1, RATE)).isfinite().all()


def test_same_seed_same_towers(tmp_path):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        towers, _ = train(tmp_path / name, lambda index: True, steps=3)
        found.append(towers.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_audio_that_has_gone_is_a_users_mistake(tmp_path):
    (tmp_path / "out").mkdir()
    write_corpus(tmp_path, lambda index: True)
    (tmp_path / "3.wav").unlink()
    with pytest.raises(UserError, match=r"3\.wav has changed"):
        train_embedder(tmp_path, CONFIG, 0, tmp_path / "out", Progress())
