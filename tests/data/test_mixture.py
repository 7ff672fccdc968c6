"""What is trained on, and in which order: mixing, filters and phases."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_ranks
from token_artifacts import read, write_tokens

from data import shared_names
from data.filters import Range
from data.mixture import Mixture, Selection
from data.windows import WindowLoader, window_loader
from model.errors import UserError

GLOBAL_BATCH = 12


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_names, "_job", None)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """60 clips from 0 on, every third of genre a, and 14 from 1,000 on."""
    folder = tmp_path_factory.mktemp("corpora")
    genres = ["a" if number % 3 == 0 else "b" for number in range(60)]
    years = [None if number == 0 else 1960 + number for number in range(60)]
    own = write_tokens(folder / "own", range(60), columns={"genre": genres, "year": years})
    columns = {"genre": ["a"] * 14, "year": [2000] * 14}
    return own, write_tokens(folder / "other", range(1000, 1014), fingerprint="other", columns=columns)


def loader(mixture: Mixture, batch: int = GLOBAL_BATCH, **options: Any) -> WindowLoader:
    options = {"seed": 1, "global_batch": GLOBAL_BATCH, **options}
    return window_loader(mixture, "train", ["semantic", "acoustic", "conditioning"], 1.0, batch=batch, **options)


def mixture_of(folders: tuple[Path, ...], *phases: Selection, block: int = 65_536) -> Mixture:
    return Mixture(tuple(read(folder) for folder in folders), phases or (Selection((1.0,) * len(folders)),), block)


def windows(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Clip and first acoustic frame of each window."""
    return [
        (int(clip), int(start))
        for clip, start in zip(batch["semantic"][:, 0, 0], batch["acoustic"][:, 0, 0], strict=True)
    ]


def epoch(found: WindowLoader) -> list[tuple[int, int]]:
    return [window for batch in found for window in windows(batch)]


def test_each_corpus_gives_its_share(corpora: tuple[Path, Path]) -> None:
    found = loader(mixture_of(corpora, Selection((2.0, 1.0))))
    epochs = [epoch(found) for _ in range(3)]
    for one in epochs:
        assert len(one) == 72
        own = [clip for clip, _ in one if clip < 1000]
        assert len(own) == 48 == len(set(own)), "a large corpus is drawn from without repeats"
        others = Counter(clip for clip, _ in one if clip >= 1000)
        assert others.total() == 24
        assert set(others) == set(range(1000, 1014)), "a small one starts over"
        assert max(others.values()) - min(others.values()) <= 1
        assert 2 < sum(clip >= 1000 for clip, _ in one[:24]) < 16, "they come in no order"
    assert len({frozenset(clip for clip, _ in one) for one in epochs}) == 3, "others of the large one each time"


def test_a_clip_that_comes_again_is_cut_elsewhere(corpora: tuple[Path, Path]) -> None:
    one = epoch(loader(mixture_of(corpora, Selection((1.0, 4.0)))))
    starts: dict[int, list[int]] = {}
    for clip, start in one:
        starts.setdefault(clip, []).append(start)
    assert sum(len(set(found)) > 1 for clip, found in starts.items() if clip >= 1000) >= 12


def test_crops_of_the_own_corpus_do_not_change_with_what_is_mixed_in(corpora: tuple[Path, Path]) -> None:
    alone = dict(epoch(loader(mixture_of(corpora[:1]))))
    mixed = {clip: start for clip, start in epoch(loader(mixture_of(corpora))) if clip < 1000}
    assert len(mixed) == 36
    assert all(alone[clip] == start for clip, start in mixed.items())


def test_clips_of_two_corpora_with_one_id_are_cut_apart(tmp_path: Path) -> None:
    folders = tuple(write_tokens(tmp_path / name, range(40), fingerprint=name) for name in ("one", "two"))
    both = epoch(loader(mixture_of(folders), global_batch=72))
    cut = Counter(both)
    assert max(cut.values()) < 3
    assert sum(count == 2 for count in cut.values()) < 20


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"genre": "a"}, set(range(0, 60, 3))),
        ({"genre": ["a", "c"], "year": Range(max=1980)}, set(range(3, 21, 3))),
        ({"year": Range(min=2000)}, set(range(40, 60))),
        ({"year": 1999}, {39}),
        ({"seconds": Range(min=4, max=4)}, set(range(60))),
    ],
)
def test_a_filter_leaves_what_passes(corpora: tuple[Path, Path], rules: Any, expected: set[int]) -> None:
    found = loader(mixture_of(corpora[:1], Selection((1.0,), (rules,))), batch=1, global_batch=1)
    assert {clip for clip, _ in epoch(found)} == expected


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"gener": "a"}, r"column 'gener', which .*own does not have\. Did you mean genre\?"),
        ({"genre": "z"}, r"leaves nothing of .*own"),
        ({"genre": Range(min=1)}, r"'genre' a range, but in .*own it does not hold numbers"),
        ({"year": Range(min=2010)}, r"10 clips are left .* fewer than the 12 that all ranks"),
    ],
)
def test_filters_that_cannot_be(corpora: tuple[Path, Path], rules: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        loader(mixture_of(corpora[:1], Selection((1.0,), (rules,))))


CURRICULUM = (
    Selection((1.0, 0.0), ({"genre": "a"},), steps=4),
    Selection((0.0, 1.0), steps=1),
    Selection((1.0, 1.0), ({}, {"year": Range(min=1980)}), steps=6),
    Selection((1.0, 1.0)),
)
"""Epochs of one step; one shorter than the corpus; one that ends amid its epoch; and the rest."""
STEPS = 20
PLACES = (0, 3, 4, 5, 8, 13)
"""Steps after which a run goes on."""


def test_phases_last_as_long_as_they_say(corpora: tuple[Path, Path]) -> None:
    steps = [{clip for clip, _ in windows(batch)} for batch in itertools.islice(endless(corpora), STEPS)]
    assert all(clip % 3 == 0 and clip < 60 for step in steps[:4] for clip in step)
    assert steps[4] < set(range(1000, 1014))
    assert all(20 <= clip < 60 or clip >= 1000 for step in steps[5:11] for clip in step)
    assert any(clip < 20 for step in steps[11:] for clip in step)
    assert all(len(step) >= 8 for step in steps)


def endless(corpora: tuple[Path, Path]) -> Any:
    found = loader(mixture_of(corpora, *CURRICULUM, block=20))
    return (batch for _ in itertools.count() for batch in found)


def go_on(corpora: tuple[Path, Path], results: Path, states: list[dict[str, int]], batch: int, workers: int) -> None:
    """On each rank: its windows of each step to the end from each of `states`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    found = []
    for place in PLACES:
        again = loader(mixture_of(corpora, *CURRICULUM, block=20), batch=batch, workers=workers)
        again.load_state_dict(states[place])
        batches = (batch for _ in itertools.count() for batch in again)
        micro = GLOBAL_BATCH // (batch * ranks)
        steps = [
            [window for one in itertools.islice(batches, micro) for window in windows(one)]
            for _ in range(STEPS - place)
        ]
        found.append(steps)
        again.close()
    (results / f"{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "batch", "workers"), [(1, 4, 2), (2, 3, 1), (2, 6, 0)])
def test_a_curriculum_goes_on_from_any_step_at_any_layout(
    corpora: tuple[Path, Path], tmp_path: Path, ranks: int, batch: int, workers: int
) -> None:
    whole = loader(mixture_of(corpora, *CURRICULUM, block=20))
    states, steps = [whole.state_dict()], []
    for one in itertools.islice((one for _ in itertools.count() for one in whole), STEPS):
        steps.append(sorted(windows(one)))
        states.append(whole.state_dict())
    run_ranks(go_on, ranks, tmp_path, corpora, tmp_path, states, batch, workers)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for place, *parts in zip(PLACES, *found, strict=True):
        together = [sorted(tuple(w) for part in step for w in part) for step in zip(*parts, strict=True)]
        assert together == steps[place:], place


def test_a_block_keeps_few_shards_in_use(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "own", range(600))
    order = mixture_of((folder,), block=60).epochs("train", 60, 1, seed=0).draw(0)
    assert sorted(order) == list(range(600))
    sizes = [entry["samples"] for entry in read(folder).index("train")]
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    in_use = [len(set(shard[at : at + 30])) for at in range(0, 600, 30)]
    assert max(in_use) <= 2 * (60 // min(sizes[:-1]) + 1)
    assert min(in_use) > 3
