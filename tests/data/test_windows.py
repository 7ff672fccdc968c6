from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from data import shard_writer, shared_names
from data.windows import DRAW, WindowLoader, window_loader
from model import artifact
from model.errors import UserError
from model.fields import TokenField

CLIP_SECONDS, HOP, EMBEDDING = 4.0, 0.5, 1.0
SEMANTIC, ACOUSTIC = TokenField("semantic", 50.0, 2, 1000), TokenField("acoustic", 75.0, 3, 1000)
CONDITIONING = TokenField("conditioning", 1 / HOP, 2, 1000)
TEXT = 999
FIELDS = ["semantic", "acoustic", "conditioning"]


def record(number: int, captions: int = 2, seconds: float = CLIP_SECONDS) -> dict[str, Any]:
    """Every code says its frame, the last semantic one the record."""
    frames, rows = SEMANTIC.frames(seconds), 1 + max(0, int((seconds - EMBEDDING) / HOP))
    semantic = np.stack([np.arange(frames), np.full(frames, number)], 1)
    acoustic = np.stack([np.arange(ACOUSTIC.frames(seconds))] * 3, 1)
    conditioning = np.stack([np.arange(rows), np.full(rows, number)], 1)
    text = np.full((captions, 2), TEXT)
    arrays = {"semantic": semantic, "acoustic": acoustic, "conditioning": conditioning, "text_conditioning": text}
    return {
        "id": f"clip-{number:06d}", "captions": json.dumps(["x"] * captions),
        **{name: array.astype(np.uint16) for name, array in arrays.items()},
    }  # fmt: skip


def write_tokens(path: Path, train: int, validation: int, captions: int = 2) -> Path:
    with artifact.create(path, "tokens", "test") as (folder, info):
        shard_writer.write_records(folder / "train", (record(number, captions) for number in range(train)))
        shard_writer.write_records(
            folder / "validation", (record(500 + number, captions) for number in range(validation))
        )
        info["fields"] = {field.name: field.to_json() for field in (SEMANTIC, ACOUSTIC, CONDITIONING)}
        info.update(clip_seconds=CLIP_SECONDS, hop_seconds=HOP, embedding_seconds=EMBEDDING)
    return path


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a job of its own: streaming opens the names of all datasets before it in a job, and keeps them."""
    monkeypatch.setattr(shared_names, "_job", None)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("windows") / "tokens", train=50, validation=7)


def loader(tokens: Path, split: str = "train", seconds: float = 1.0, batch: int = 4, **options: Any) -> WindowLoader:
    options = {"batch": batch, "global_batch": batch, "seed": 3, **options}
    return window_loader(tokens, split, FIELDS, seconds, **options)


def crops(windows: WindowLoader) -> dict[int, int]:
    """First semantic frame by record, over one epoch."""
    return {int(row[0, 1]): int(row[0, 0]) for batch in windows for row in batch["semantic"]}


def flat(batch: dict[str, torch.Tensor]) -> list[int]:
    return torch.cat([value.flatten() for _, value in sorted(batch.items())]).tolist()


@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.5, 4.0])
def test_all_fields_start_at_one_moment(tokens: Path, seconds: float) -> None:
    windows = loader(tokens, seconds=seconds)
    for _ in range(3):
        for batch in windows:
            for field in (SEMANTIC, ACOUSTIC):
                assert batch[field.name].dtype == torch.int64
                assert batch[field.name].shape == (4, field.frames(seconds), field.quantizers)
                frames = batch[field.name][:, :, 0]
                assert (frames.diff(dim=1) == 1).all()
            assert batch["conditioning"].shape == (4, 1, 2)
            semantic, acoustic = batch["semantic"][:, 0, 0], batch["acoustic"][:, 0, 0]
            assert (semantic * 3 == acoustic * 2).all()
            centre = semantic / SEMANTIC.rate_hz + seconds / 2
            rows = batch["conditioning"][:, 0, 0] * HOP + EMBEDDING / 2
            nearest = torch.clamp(centre, EMBEDDING / 2, CLIP_SECONDS - EMBEDDING / 2)
            assert ((rows - nearest).abs() <= HOP / 2 + 1e-6).all()
            assert (batch["conditioning"][:, 0, 1] == batch["semantic"][:, 0, 1]).all()


def test_windows_reach_every_place_of_a_clip(tokens: Path) -> None:
    windows = loader(tokens, seconds=3.8)
    starts = {start for _ in range(12) for start in crops(windows).values()}
    assert starts == {0, 2, 4, 6, 8, 10}


def test_a_crop_depends_on_seed_epoch_and_clip_alone(tokens: Path) -> None:
    one, other = loader(tokens, batch=4), loader(tokens, batch=7, workers=2)
    first, again = crops(one), crops(other)
    shared = first.keys() & again.keys()
    assert len(shared) > 40
    assert all(first[clip] == again[clip] for clip in shared)
    second = crops(one)
    assert sum(first[clip] == second[clip] for clip in first.keys() & second.keys()) < 10
    elsewhere = crops(loader(tokens, seed=4))
    assert sum(first[clip] == elsewhere[clip] for clip in first.keys() & elsewhere.keys()) < 10


def test_a_draw_depends_on_seed_epoch_and_clip_alone(tokens: Path) -> None:
    def draws(windows: WindowLoader) -> dict[int, int]:
        return {
            int(clip): int(draw)
            for batch in windows
            for clip, draw in zip(batch["semantic"][:, 0, 1], batch[DRAW], strict=True)
        }

    one = loader(tokens)
    first, other = draws(one), draws(loader(tokens, batch=5, seconds=2.0, workers=2))
    assert all(first[clip] == other[clip] for clip in first.keys() & other.keys())
    assert len({*first.values(), *draws(one).values(), *draws(loader(tokens, seed=4)).values()}) == 3 * 48
    assert min(first.values()) >= 0
    assert max(first.values()) > 2**61


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_an_epoch_is_whole_global_batches_in_a_new_order(tokens: Path, batch: int) -> None:
    windows = loader(tokens, batch=batch, global_batch=16)
    assert len(windows) == 48 // batch
    orders = [list(crops(windows)) for _ in range(3)]
    assert all(len(order) == 48 for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert windows.epoch == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 12, 17])
def test_a_new_loader_goes_on_exactly(tokens: Path, workers: int, taken: int) -> None:
    def stream(windows: WindowLoader, count: int, seen: list[list[int]]) -> dict[str, int]:
        while count:
            for batch in windows:
                seen.append(flat(batch))
                count -= 1
                if not count:
                    break
        return windows.state_dict()

    whole: list[list[int]] = []
    stream(loader(tokens, text_probability=0.5), 30, whole)
    halves: list[list[int]] = []
    state = stream(loader(tokens, text_probability=0.5, workers=workers), taken, halves)
    resumed = loader(tokens, text_probability=0.5, workers=workers)
    resumed.load_state_dict(state)
    assert resumed.epoch == taken // 12
    stream(resumed, 30 - taken, halves)
    assert halves == whole


def test_going_back_and_leaving_an_epoch_halfway(tokens: Path) -> None:
    windows = loader(tokens)
    states, seen = [windows.state_dict()], []
    for _ in range(2):
        for batch in windows:
            seen.append(flat(batch))
            states.append(windows.state_dict())
    for place in (20, 3, 12):
        windows.load_state_dict(states[place])
        assert flat(next(iter(windows))) == seen[place]
        if place != 12:
            assert flat(next(iter(windows))) == seen[place + 1]


def test_validation_is_the_same_each_time(tokens: Path) -> None:
    windows = loader(tokens, "validation", shuffle=False, batch=4)
    assert len(windows) == 2
    first = [flat(batch) for batch in windows]
    next(iter(windows))
    assert [flat(batch) for batch in windows] == first
    assert sorted(crops(windows)) == list(range(500, 507))


def test_text_takes_the_place_of_audio(tokens: Path, tmp_path: Path) -> None:
    def share(windows: WindowLoader) -> float:
        return float(torch.cat([(batch["conditioning"] == TEXT).all(-1).float() for batch in windows]).mean())

    assert share(loader(tokens)) == 0
    assert share(loader(tokens, text_probability=1.0)) == 1
    half = loader(tokens, text_probability=0.5)
    assert 0.3 < np.mean([share(half) for _ in range(5)]) < 0.7
    silent = write_tokens(tmp_path / "tokens", train=4, validation=1, captions=0)
    assert share(loader(silent, text_probability=1.0)) == 0


def test_fewer_records_than_a_global_batch(tmp_path: Path) -> None:
    few = write_tokens(tmp_path / "tokens", train=4, validation=1)
    windows = loader(few, batch=4, global_batch=8)
    assert len(windows) == 2
    list(windows)
    handles = len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        batches = list(windows)
        assert len(batches) == 2
        assert {clip for batch in batches for clip in batch["semantic"][:, 0, 1].tolist()} == {0, 1, 2, 3}
    assert len(os.listdir("/proc/self/fd")) <= handles + 2, "epochs leave files open"


@pytest.mark.parametrize("global_batch", [None, 6])
def test_a_global_batch_that_cannot_be_shared_out(tokens: Path, global_batch: int | None) -> None:
    with pytest.raises(ValueError, match=f"1 ranks cannot share out a global batch of {global_batch} in batches of 4"):
        loader(tokens, batch=4, global_batch=global_batch)


LENGTHS = (4.0, 3.21, 1.3, 0.5)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several lengths, one of them with a part of a step of the grid at its end."""
    path = tmp_path_factory.mktemp("unequal") / "tokens"
    with artifact.create(path, "tokens", "test") as (folder, info):
        for split, first in (("train", 0), ("validation", 100)):
            rows = (record(first + number, seconds=LENGTHS[number % 4]) for number in range(16))
            shard_writer.write_records(folder / split, rows)
        info["fields"] = {field.name: field.to_json() for field in (SEMANTIC, ACOUSTIC, CONDITIONING)}
        info.update(clip_seconds=CLIP_SECONDS, hop_seconds=HOP, embedding_seconds=EMBEDDING)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_windows_are_as_long_as_their_clip_allows(unequal: Path, workers: int) -> None:
    windows = loader(unequal, seconds=2.0, packed=True, workers=workers)
    seen: dict[int, set[int]] = {}
    for _ in range(3):
        for batch in windows:
            assert len(batch) == 4
            for window in batch:
                semantic, acoustic = window["semantic"][0, :, 0], window["acoustic"][0, :, 0]
                assert len(semantic) * 3 == len(acoustic) * 2
                assert semantic[0] * 3 == acoustic[0] * 2
                assert (semantic.diff() == 1).all()
                assert (acoustic.diff() == 1).all()
                assert window["conditioning"].shape == (1, 1, 2)
                length, clip = len(semantic) / SEMANTIC.rate_hz, int(window["semantic"][0, 0, 1])
                assert length == {4.0: 2.0, 3.21: 2.0, 1.3: 1.28, 0.5: 0.48}[LENGTHS[clip % 4]]
                nearest = float(semantic[0]) / SEMANTIC.rate_hz + length / 2
                nearest = min(max(nearest, EMBEDDING / 2), max(EMBEDDING / 2, LENGTHS[clip % 4] - EMBEDDING / 2))
                assert abs(float(window["conditioning"][0, 0, 0]) * HOP + EMBEDDING / 2 - nearest) <= HOP / 2 + 0.01
                seen.setdefault(clip, set()).add(int(semantic[0]))
    assert all(len(starts) > 1 for clip, starts in seen.items() if LENGTHS[clip % 4] > 2)


def test_a_packed_stream_goes_on_exactly(unequal: Path) -> None:
    def take(windows: WindowLoader, count: int) -> list[list[list[int]]]:
        return [[flat(window) for window in batch] for _, batch in zip(range(count), windows, strict=False)]

    whole = take(loader(unequal, seconds=2.0, packed=True), 4)
    windows = loader(unequal, seconds=2.0, packed=True)
    halves = take(windows, 2)
    resumed = loader(unequal, seconds=2.0, packed=True)
    resumed.load_state_dict(windows.state_dict())
    assert halves + take(resumed, 2) == whole


def test_a_clip_shorter_than_a_window_needs_packing(unequal: Path) -> None:
    with pytest.raises(ValueError, match=r"shorter than a window of 2\.0 s"):
        list(loader(unequal, seconds=2.0))


def test_a_window_longer_than_the_clips(tokens: Path) -> None:
    with pytest.raises(UserError, match=r"window of 5 s .* longer than the clips \(data.clip_seconds=4\)"):
        loader(tokens, seconds=5.0)


def test_draws_nothing_from_the_trainings_random_numbers(tokens: Path) -> None:
    windows = loader(tokens)
    before = torch.get_rng_state()
    for batch in windows:
        assert batch["semantic"].is_contiguous()
        batch["semantic"] += 1  # it is ours to change
    assert (torch.get_rng_state() == before).all()


GLOBAL_BATCH, STEPS = 12, 10
PLACES = (0, 3, 4, 6)
"""Optimizer steps after which a run goes on: the start, amid an epoch, at its end and after it."""
LAYOUTS = {1: ((12, 0), (1, 2)), 2: ((6, 0), (1, 2)), 3: ((4, 2), (1, 0)), 4: ((3, 0), (1, 2))}
"""By number of ranks: micro batches and loader workers."""
State = dict[str, int]
Steps = list[list[list[int]]]
"""Clip, first frame, whether text, and draw of each window of each step, in no order within the step."""


def take(windows: WindowLoader, micro_batches: int, count: int) -> Iterator[tuple[list[list[int]], State]]:
    """This rank's windows of `count` optimizer steps, and the state after each."""
    batches = (batch for _ in itertools.count() for batch in windows)
    for _ in range(count):
        step = []
        for batch in itertools.islice(batches, micro_batches):
            text = (batch["conditioning"] == TEXT).flatten(1).all(1, keepdim=True)
            step += torch.cat([batch["semantic"][:, 0], text, batch[DRAW][:, None]], dim=1).tolist()
        yield step, windows.state_dict()


def go_on_from_each_place(tokens: Path, results: Path, states: list[State]) -> None:
    """On each rank: for each layout and place, the steps from there and the state after each."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    found = []
    for micro_batch, workers in LAYOUTS[ranks]:
        for place in PLACES:
            windows = loader(
                tokens, batch=micro_batch, global_batch=GLOBAL_BATCH, workers=workers, text_probability=0.5
            )
            windows.load_state_dict(states[place])
            found.append(list(take(windows, GLOBAL_BATCH // (micro_batch * ranks), STEPS - place)))
    (results / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_the_same_windows_at_every_step_whatever_the_layout(tokens: Path, tmp_path: Path, ranks: int) -> None:
    """A run that goes on, from a state that any layout leaves, at any other."""
    windows = loader(tokens, batch=GLOBAL_BATCH, global_batch=GLOBAL_BATCH, text_probability=0.5)
    states = [windows.state_dict()]
    expected: Steps = []
    for step, state in take(windows, 1, STEPS):
        expected.append(sorted(step))
        states.append(state)
    assert len({tuple(window) for step in expected for window in step}) == STEPS * GLOBAL_BATCH
    run_ranks(go_on_from_each_place, ranks, tmp_path, tokens, tmp_path, states)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    cases = itertools.product(LAYOUTS[ranks], PLACES)
    for (layout, place), *runs in zip(cases, *found, strict=True):
        together = [sorted(window for step, _ in parts for window in step) for parts in zip(*runs, strict=True)]
        assert together == expected[place:], (layout, place)
        for run in runs:
            assert [state for _, state in run] == states[place + 1 :], (layout, place)


def share_validation(tokens: Path, results: Path) -> None:
    dist.init_process_group("gloo")
    validation = loader(tokens, "validation", shuffle=False, batch=3)
    seen = [[batch["semantic"][:, 0, 1].tolist() for batch in validation] for _ in range(2)]
    (results / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def test_two_ranks_share_the_validation(tokens: Path, tmp_path: Path) -> None:
    run_ranks(share_validation, 2, tmp_path, tokens, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for first, second in found:
        assert first == second
        assert [len(batch) for batch in first] == [3, 1]
    assert {clip for first, _ in found for batch in first for clip in batch} == set(range(500, 507))
