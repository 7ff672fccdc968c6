"""A function over many tasks, on as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data.processes import die_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


def over_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    tasks_a_process: int = 64,
    chunk: int = 16,
    lost: Callable[[Task], Result] | None = None,
) -> Iterator[Result]:
    """Yields `function(task)` for each of `tasks`, in their order.

    Fewer than `tasks_a_process` tasks are not worth starting another process for. The processes end when this one does,
    however it ends. `function` must be importable by name. With `lost`, a task whose process is killed, by a crash in a
    decoder or for its memory, gives `lost(task)`; without it BrokenProcessPool is raised.
    """
    processes = min(os.cpu_count() or 1, -(-len(tasks) // tasks_a_process))
    if processes <= 1:
        yield from map(function, tasks)
        return
    done = 0
    while done < len(tasks):
        try:
            with _pool(processes) as pool:
                for result in pool.map(function, tasks[done:], chunksize=chunk):
                    done += 1
                    yield result
        except BrokenProcessPool:
            if lost is None:
                raise
            # Any task in work may have been the one: those that come next show it when each has a process of its own.
            for task in tasks[done : done + processes * chunk]:
                done += 1
                yield _alone(function, task, lost)


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork of a process that runs threads can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=die_with_parent, initargs=(os.getpid(),))


def _alone(function: Callable[[Task], Result], task: Task, lost: Callable[[Task], Result]) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(function, task).result()
    except BrokenProcessPool:
        return lost(task)
