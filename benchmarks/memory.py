"""How much memory a piece of work takes, to the byte: counted by torch's allocators, not by the operating system."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Memory:
    """Bytes beyond those that were held before the work began."""

    peak: int
    """Held at most at any time during the work."""
    held: int
    """Still held after it, by what it returned and what that keeps alive."""


def measure(work: Callable[[], object], device: str = "cpu") -> Memory:
    """The memory that `work` takes on `device`. Every tensor counts, temporaries inside kernels too.

    On a GPU torch's own counters are read. On a CPU it has none, but its profiler sees every allocation; what a
    library such as oneDNN allocates for itself is seen by neither.
    """
    return _on_gpu(work, device) if torch.device(device).type == "cuda" else _on_cpu(work)


def _on_gpu(work: Callable[[], object], device: str) -> Memory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    memory = Memory(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    del result  # held until here, so that it counts
    return memory


def _on_cpu(work: Callable[[], object]) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()
    del result  # held until here, so that it counts
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    held = [0, *accumulate(change["args"]["Bytes"] for change in changes)]
    return Memory(max(held), held[-1])
