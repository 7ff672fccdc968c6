from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from data.pool import over_processes

CRASHING = (3, 17)


def doubled(task: int) -> int:
    if task in CRASHING:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_a_task_that_kills_its_process_is_lost_alone() -> None:
    results = list(over_processes(doubled, range(20), tasks_a_process=4, chunk=2, lost=lambda task: -task))
    assert results == [-task if task in CRASHING else 2 * task for task in range(20)]


def test_without_a_substitute_it_raises() -> None:
    with pytest.raises(BrokenProcessPool):
        list(over_processes(doubled, range(20), tasks_a_process=4, chunk=2))
