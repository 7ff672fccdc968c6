from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming.base.batching import generate_work
from streaming.base.world import World

from data import shard_writer, shards, shared_names
from data.epochs import Phase, Pool, Shuffled
from data.token_corpus import TokenCorpus, shard_sizes
from model import artifact

MEMORY = Path("/dev/shm")


def record(number: int) -> dict[str, Any]:
    codes = np.arange(12, dtype=np.uint16).reshape(4, 3) + number
    return {
        "id": f"clip-{number}", "captions": '["a \\u00e9"]' if number % 2 else "[]", "conditioning": codes[:1],
        "semantic": codes[:, :1], "acoustic": codes, "text_conditioning": codes[: number % 2],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "train"
    assert shard_writer.write_records(path, map(record, range(20))) == 20
    return path


def open_shards(folder: Path) -> shards.Shards:
    return reader_of(folder, records=20, batch=4)


def reader_of(folder: Path, records: int, batch: int) -> shards.Shards:
    """All records of one shard folder, `records` an epoch."""
    corpus = TokenCorpus(folder.parent, "tokens", {"info": {}, "fingerprint": "f"})
    (size,) = shard_sizes(corpus.index(folder.name))
    pool = Pool(np.arange(size), np.zeros(size, int))
    epochs = Shuffled([Phase([pool], [1.0])], size, records, block=1024, seed=0)
    return shards.Shards([corpus], folder.name, lambda row, epoch, key: row, epochs, batch=batch)


def names(job: int | None) -> list[str]:
    return [path.name for path in MEMORY.glob(f"{shared_names.JOB_NAME}{job}-*")]


def job(folder: Path, epochs: int, done: Any) -> None:
    """A training of its own: in a forked process, because importing streaming takes seconds."""
    shared_names._job = None
    reader = open_shards(folder)
    for _ in range(epochs):
        done.put(len(list(reader)))
    while True:
        time.sleep(1)


def test_round_trip(folder: Path) -> None:
    assert len(shards.first_records(folder, 1000)) == 20
    rows = {row["id"]: row for row in open_shards(folder)}
    assert len(rows) == 20
    for number in range(20):
        for name, value in record(number).items():
            found = rows[f"clip-{number}"][name]
            if isinstance(value, np.ndarray):
                assert found.dtype == np.uint16
                np.testing.assert_array_equal(found, value)
            else:
                assert found == value


def test_jobs_that_start_together_and_die_leave_nothing_in_the_way(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        done = context.SimpleQueue()
        jobs = [context.Process(target=job, args=(folder, 3, done)) for _ in range(4)]
        for process in jobs:
            process.start()
        try:
            assert [done.get() for _ in range(12)] == [20] * 12
            assert all(names(process.pid) for process in jobs)
            shared_names.remove_leftovers()
            assert all(names(process.pid) for process in jobs), "what is in use was removed"
        finally:
            for process in jobs:
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
        assert all(names(process.pid) for process in jobs)
        start = context.Process(target=job, args=(folder, 1, done))
        start.start()
        try:
            assert done.get() == 20
            assert names(start.pid)
            assert not any(names(process.pid) for process in jobs), "the next start leaves what the dead ones left"
        finally:
            start.terminate()
            start.join()


@pytest.mark.parametrize("drop", [0, 12, 36])
def test_one_order_whatever_the_nodes_ranks_workers_and_batches(folder: Path, drop: int) -> None:
    """Each 12 records in turn are the same for jobs that one machine could not run, of several nodes too."""

    def global_batches(nodes: int, ranks: int, workers: int, batch: int) -> list[list[int]]:
        reader = reader_of(folder, records=48, batch=batch)
        reader.resume(epoch=3, records=drop)
        world = World(nodes, ranks, workers, 0)
        work = generate_work(reader.batching_method, reader, world, *reader._resume(world, 0))
        assert work.shape[:3] == (nodes, ranks, workers)
        arriving = work.transpose(3, 2, 0, 1, 4).flatten()
        found = arriving[arriving >= 0].tolist()
        return [sorted(found[at : at + 12]) for at in range(0, len(found), 12)]

    whole = global_batches(1, 1, 1, 12)
    assert len(whole) == (48 - drop) // 12
    for layout in [(1, 2, 2, 3), (1, 3, 1, 4), (1, 4, 2, 1), (2, 1, 2, 2), (2, 3, 1, 2), (3, 2, 3, 1), (4, 1, 1, 3)]:
        assert global_batches(*layout) == whole, layout


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    with artifact.create(tmp_path / "tokens", "tokens", "t") as (path, _):
        for split in ("train", "validation"):
            shard_writer.write_records(path / split, map(record, range(20)))
    return tmp_path / "tokens"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"), [(Path.unlink, "is missing"), (cut_short, "bytes"), (flip_one_bit, "has changed")]
)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", ["train/shard.00000.mds", "validation/index.json"])
def test_damage_is_found_by_one_rank_and_named(
    tokens: Path, name: str, world_size: int, damage: Callable[[Path], None], words: str
) -> None:
    def problems() -> list[str]:
        corpus = TokenCorpus.read(tokens)
        return [text for rank in range(world_size) for text in corpus.damage((rank, world_size))]

    assert problems() == []
    damage(tokens / name)
    (problem,) = problems()
    assert str(tokens / name) in problem
    assert words in problem


def test_says_what_a_launcher_forgot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(shared_names, "_job", None)
    with pytest.raises(RuntimeError, match="LOCAL_WORLD_SIZE"):
        open_shards(folder)
