"""The built-in corpus: whole, the same for a seed however it is made, and honest about what is held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data.pool
from data.builtin import held_out_combinations, write_corpus
from data.captions import HELD_OUT_TEMPLATES
from data.config import DataConfig
from data.corpus import HELD_OUT, TRAIN, VALIDATION, load_clip, read_clips, read_prompts
from data.progress import Progress
from data.synthesis import ATTRIBUTES
from model.errors import UserError

JUDGED = ("instrument", "register", "tempo", "drums")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, DataConfig(clips=64, clip_seconds=2.0), 3, Progress())
    return folder


def test_every_clip_has_audio_captions_and_attributes(corpus: Path) -> None:
    clips = read_clips(corpus)
    assert len(clips) == 64
    assert len({clip.id for clip in clips}) == 64
    for clip in clips:
        info = soundfile.info(corpus / clip.path)
        assert (info.frames, info.samplerate, info.channels) == (32_000, 16_000, 1)
        assert len(set(clip.captions)) == 4
        assert clip.attributes is not None
        assert {name: clip.attributes[name] in values for name, values in ATTRIBUTES.items()} == dict.fromkeys(
            ATTRIBUTES, True
        )
    assert load_clip(corpus, clips[0], 16_000).shape == (32_000,)


def test_held_out_combinations_are_in_no_other_split(corpus: Path) -> None:
    held_out = [tuple(one[name] for name in JUDGED) for one in held_out_combinations(3)]
    for clip in read_clips(corpus):
        assert clip.attributes is not None
        combination = tuple(clip.attributes[name] for name in JUDGED)
        assert (combination in held_out) == (clip.split == HELD_OUT)


def test_what_the_manifest_says_is_so(tmp_path: Path) -> None:
    info = write_corpus(tmp_path, DataConfig(clips=40, clip_seconds=0.5), 0, Progress())
    assert info["clips"] == 40
    assert info["splits"] == dict(Counter(clip.split for clip in read_clips(tmp_path)))
    assert set(info["splits"]) == {TRAIN, VALIDATION, HELD_OUT}
    assert info["held_out_combinations"] == held_out_combinations(0)
    assert info["captions"] is True


@pytest.mark.parametrize("seed", range(5))
def test_held_out_combinations_are_spread_evenly(seed: int) -> None:
    chosen = held_out_combinations(seed)
    assert len({tuple(one.values()) for one in chosen}) == 8
    for name in JUDGED:
        counts = Counter(one[name] for one in chosen)
        assert set(counts) == set(ATTRIBUTES[name])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_prompts_ask_for_held_out_combinations_only(corpus: Path) -> None:
    prompts = read_prompts(corpus)
    assert len({prompt.prompt for prompt in prompts}) > 55
    counts = Counter(tuple((prompt.attributes or {}).values()) for prompt in prompts)
    assert set(counts) == {tuple(one.values()) for one in held_out_combinations(3)}
    assert len(set(counts.values())) == 1
    trained = {text for clip in read_clips(corpus, TRAIN) for text in clip.captions}
    assert not trained & {prompt.prompt for prompt in prompts}
    assert len(HELD_OUT_TEMPLATES) >= 8


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(clips=80, clip_seconds=0.5)  # 64 are enough for one process
    for processes in (1, 2):
        monkeypatch.setattr(data.pool.os, "cpu_count", lambda processes=processes: processes)
        write_corpus(tmp_path / str(processes), config, 0, Progress())
    one, two = ({path.relative_to(tmp_path / n): path.read_bytes() for path in sorted((tmp_path / n).rglob("*.*"))}
                for n in ("1", "2"))  # fmt: skip
    assert len(one) == 80 + 3
    assert one == two


def test_another_seed_is_another_corpus(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, DataConfig(clips=8, clip_seconds=2.0), 4, Progress())
    one, other = (soundfile.read(folder / read_clips(folder)[0].path)[0] for folder in (corpus, tmp_path))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("key", "value"), [("clips", 7), ("sample_rate", 8_000)])
def test_too_little_is_refused_by_name(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"data\.{key} is {value}"):
        write_corpus(tmp_path, DataConfig(**{key: value}), 0, Progress())
