"""The judge hears what is there: on unseen combinations, through a codec, in parts of clips, and it learns no more."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

import model.encoders.mel
from data.builtin import held_out_combinations
from data.synthesis import combinations, render
from model.config import CodecConfig
from model.encoders.mel import MelCodec
from trainer.judge import JUDGED, Judge

RATE = 16_000
Example = tuple[np.ndarray, dict[str, str]]


def examples(which: list[dict[str, str]], number: int, seed: int) -> list[Example]:
    mode = ("major", "minor")
    wanted = [{**which[index % len(which)], "mode": mode[index % 2]} for index in range(number)]
    return [(render(attributes, seed, index), attributes) for index, attributes in enumerate(wanted)]


@pytest.fixture(scope="module")
def seen() -> list[Example]:
    held_out = held_out_combinations(0)
    return examples([one for one in combinations() if one not in held_out], 120, seed=1)


@pytest.fixture(scope="module")
def unseen() -> list[Example]:
    """Clips of combinations that no calibration clip has."""
    return examples(held_out_combinations(0), 60, seed=2)


@pytest.fixture(scope="module")
def judge(seen: list[Example]) -> Judge:
    return Judge.fit(seen, RATE)


def shares(judge: Judge, clips: list[Example]) -> dict[str, float]:
    """Share of right answers for each attribute."""
    answers = [(judge.judge(wave), attributes) for wave, attributes in clips]
    return {name: float(np.mean([found[name] == truth[name] for found, truth in answers])) for name in JUDGED}


def test_unseen_combinations_are_judged_right(judge: Judge, unseen: list[Example]) -> None:
    right = shares(judge, unseen)
    assert min(right.values()) >= 0.95, right


def test_level_and_position_do_not_matter(judge: Judge, unseen: list[Example]) -> None:
    late = [(0.05 * wave[int(0.3 * RATE) : int(4.6 * RATE)], truth) for wave, truth in unseen]
    right = shares(judge, late)
    assert min(right.values()) >= 0.9, right


def test_noise_lowers_the_score_only_a_little(seen: list[Example], unseen: list[Example]) -> None:
    random = np.random.default_rng(0)

    def noisy(clips: list[Example]) -> list[Example]:
        return [(wave + 0.003 * random.standard_normal(len(wave)).astype(np.float32), truth) for wave, truth in clips]

    right = shares(Judge.fit([*seen, *noisy(seen[:60])], RATE), noisy(unseen[:40]))
    assert np.mean(list(right.values())) >= 0.95, right


def test_clips_through_the_codec_are_judged_right(
    seen: list[Example], unseen: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.encoders.mel, "GRIFFIN_LIM_STEPS", 8)  # a poorer codec, but a quicker test
    codec = MelCodec(CodecConfig(quantizers=6, codebook_size=128))
    codec.quantizer.fit([codec.vectors(torch.from_numpy(wave)[None])[0] for wave, _ in seen[:60]], iterations=4)

    def coded(clips: list[Example]) -> list[Example]:
        # One by one: large batches fall out of the processor's caches.
        return [(codec.decode(codec.encode(torch.from_numpy(wave)[None]))[0].numpy(), truth) for wave, truth in clips]

    right = shares(Judge.fit([*seen, *coded(seen[:60])], RATE), coded(unseen[:24]))
    assert np.mean(list(right.values())) >= 0.95, right


def test_wrong_labels_teach_nothing(seen: list[Example], unseen: list[Example]) -> None:
    order = np.random.default_rng(0).permutation(len(seen))
    shuffled = [(wave, seen[place][1]) for (wave, _), place in zip(seen, order, strict=True)]
    right = shares(Judge.fit(shuffled, RATE), unseen)
    # Chance is 0.2, 0.5, 0.33 and 0.5.
    assert np.mean(list(right.values())) < 0.55, right


@pytest.mark.parametrize("seconds", [0.0, 0.01, 1.0, 5.0, 12.0])
def test_silence_gets_some_answer(judge: Judge, seconds: float) -> None:
    found = judge.judge(np.zeros(round(seconds * RATE), dtype=np.float32))
    assert set(found) == set(JUDGED)


def test_a_stored_judge_gives_the_same_answers(judge: Judge, unseen: list[Example]) -> None:
    stored = Judge.from_json(json.loads(json.dumps(judge.to_json())))
    for wave, _ in unseen[:5]:
        assert stored.probabilities(wave) == judge.probabilities(wave)
        assert sum(stored.probabilities(wave)["instrument"].values()) == pytest.approx(1)


def test_any_sample_rate_will_do() -> None:
    held_out = held_out_combinations(0)
    rest = [one for one in combinations() if one not in held_out]
    made = [(render({**one, "mode": "major"}, 0, i, sample_rate=24_000), one) for i, one in enumerate(rest + held_out)]
    right = shares(Judge.fit(made[: len(rest)], 24_000), made[len(rest) :])
    assert np.mean(list(right.values())) >= 0.9, right


def test_no_examples_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs examples"):
        Judge.fit([], RATE)


def test_judging_is_quick(judge: Judge, unseen: list[Example]) -> None:
    start = time.process_time()
    for wave, _ in unseen[:20]:
        judge.judge(wave)
    # 9 ms where it was written.
    assert (time.process_time() - start) / 20 < 0.1
