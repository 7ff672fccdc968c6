from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import shards

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
    assert shards.write_records(path, map(record, range(20))) == 20
    return path


def open_shards(folder: Path) -> shards.Shards:
    return shards.Shards(folder, lambda row, epoch: row, records=20, batch=4, seed=0, shuffle=True)


def names(job: int | None) -> list[str]:
    return [path.name for path in MEMORY.glob(f"{shards.JOB_NAME}{job}-*")]


def job(folder: Path, epochs: int, done: Any) -> None:
    """A training of its own: in a forked process, because importing streaming takes seconds."""
    shards._job = None
    reader = open_shards(folder)
    for _ in range(epochs):
        done.put(len(list(reader)))
    while True:
        time.sleep(1)


def test_round_trip(folder: Path) -> None:
    assert shards.count_records(folder) == 20
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
            shards.remove_leftovers()
            assert all(names(process.pid) for process in jobs), "what is in use was removed"
        finally:
            for process in jobs:
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
        assert all(names(process.pid) for process in jobs)
        shards.remove_leftovers()
        assert not any(names(process.pid) for process in jobs)


def test_says_what_a_launcher_forgot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(shards, "_job", None)
    with pytest.raises(RuntimeError, match="LOCAL_WORLD_SIZE"):
        open_shards(folder)
