"""A function over many tasks, on as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from data.processes import die_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


def over_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], tasks_a_process: int = 64, chunk: int = 16
) -> Iterator[Result]:
    """Yields `function(task)` for each of `tasks`, in their order.

    Fewer than `tasks_a_process` tasks are not worth starting another process for. The processes end when this one does,
    however it ends. `function` must be importable by name.
    """
    processes = min(os.cpu_count() or 1, -(-len(tasks) // tasks_a_process))
    if processes <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: a fork of a process that runs threads can hang.
    context = multiprocessing.get_context("spawn")
    own = (os.getpid(),)
    with ProcessPoolExecutor(processes, context, initializer=die_with_parent, initargs=own) as executor:
        yield from executor.map(function, tasks, chunksize=chunk)
