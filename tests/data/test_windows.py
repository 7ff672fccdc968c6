from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data import shards
from data.windows import WindowLoader, window_loader
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
        shards.write_records(folder / "train", (record(number, captions) for number in range(train)))
        shards.write_records(folder / "validation", (record(500 + number, captions) for number in range(validation)))
        info["fields"] = {field.name: field.to_json() for field in (SEMANTIC, ACOUSTIC, CONDITIONING)}
        info.update(clip_seconds=CLIP_SECONDS, hop_seconds=HOP, embedding_seconds=EMBEDDING)
    return path


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a job of its own: streaming opens the names of all datasets before it in a job, and keeps them."""
    monkeypatch.setattr(shards, "_job", None)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("windows") / "tokens", train=50, validation=7)


def loader(tokens: Path, split: str = "train", seconds: float = 1.0, batch: int = 4, **options: Any) -> WindowLoader:
    return window_loader(tokens, split, FIELDS, seconds, **{"batch": batch, "seed": 3, **options})


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


def test_an_epoch_is_whole_batches_in_a_new_order(tokens: Path) -> None:
    windows = loader(tokens, batch=8)
    assert len(windows) == 6
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


def test_fewer_records_than_a_batch(tmp_path: Path) -> None:
    few = write_tokens(tmp_path / "tokens", train=3, validation=1)
    windows = loader(few, batch=8)
    assert len(windows) == 1
    list(windows)
    handles = len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        (batch,) = list(windows)
        assert set(batch["semantic"][:, 0, 1].tolist()) == {0, 1, 2}
    assert len(os.listdir("/proc/self/fd")) <= handles + 2, "epochs leave files open"


LENGTHS = (4.0, 3.21, 1.3, 0.5)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several lengths, one of them with a part of a step of the grid at its end."""
    path = tmp_path_factory.mktemp("unequal") / "tokens"
    with artifact.create(path, "tokens", "test") as (folder, info):
        for split, first in (("train", 0), ("validation", 100)):
            rows = (record(first + number, seconds=LENGTHS[number % 4]) for number in range(16))
            shards.write_records(folder / split, rows)
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


def start_ranks(ranks: int, folder: Path, task: Callable[[int], Any]) -> list[Any]:
    """`task(rank)` in `ranks` new processes with a process group; their results."""
    context = multiprocessing.get_context("fork")  # streaming is imported already
    queue = context.SimpleQueue()

    def run(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        shards._job = None
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        queue.put((rank, task(rank)))
        if ranks > 1:
            dist.barrier()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    (folder / "store").unlink(missing_ok=True)
    return [results[rank] for rank in range(ranks)]


def test_two_ranks_share_an_epoch_and_one_goes_on(tokens: Path, tmp_path: Path) -> None:
    def two(rank: int) -> Any:
        windows = loader(tokens, batch=4)
        assert len(windows) == 6
        epoch = [crop for batch in windows for crop in batch["semantic"][:, 0].tolist()]
        later = [batch["semantic"][:, 0].tolist() for batch, _ in zip(windows, range(3), strict=False)]
        state = windows.state_dict()
        rest = [batch["semantic"][:, 0].tolist() for batch in windows]
        validation = loader(tokens, "validation", shuffle=False, batch=3)
        seen = [[batch["semantic"][:, 0, 1].tolist() for batch in validation] for _ in range(2)]
        return epoch, later, state, rest, seen

    (epoch, later, state, rest, seen), (epoch2, _, state2, rest2, seen2) = start_ranks(2, tmp_path, two)
    clips, clips2 = {clip for _, clip in epoch}, {clip for _, clip in epoch2}
    assert len(clips) == len(clips2) == 24
    assert not clips & clips2
    assert state == state2
    assert len(later) == 3
    assert [len(batch) for batch in seen[0]] == [len(batch) for batch in seen2[0]] == [3, 1]
    assert seen[0] == seen[1]
    assert {clip for batch in seen[0] + seen2[0] for clip in batch} == set(range(500, 507))

    def one(rank: int) -> Any:
        windows = loader(tokens, batch=8)
        windows.load_state_dict(state)
        return [batch["semantic"][:, 0].tolist() for batch in windows]

    (alone,) = start_ranks(1, tmp_path, one)
    together = [sorted(left + right) for left, right in zip(rest, rest2, strict=True)]
    assert [sorted(batch) for batch in alone] == together
