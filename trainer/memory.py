"""Memory of this rank's device, in bytes: a GPU's, or its share of the machine's where there is none."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import psutil
import torch


def on_gpu() -> bool:
    return torch.cuda.is_available()


def free_memory() -> int:
    """What this rank could take besides what it holds; ranks of one machine share its memory evenly."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0]
    free = min([psutil.virtual_memory().available, *_left_in_groups()])
    return free // int(os.environ["LOCAL_WORLD_SIZE"])


def held_memory() -> int:
    """What this rank holds: on a GPU torch's tensors and what it keeps for more, on a CPU all of the process."""
    return torch.cuda.memory_reserved() if on_gpu() else psutil.Process().memory_info().rss


def peak_memory() -> int:
    """What this rank held at most since `clear_memory`."""
    if on_gpu():
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def clear_memory() -> None:
    """Gives back what is not in use, and lets `peak_memory` start from there."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def out_of_memory(error: Exception) -> bool:
    """Whether `error` is what torch or Python raises where there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _left_in_groups(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the container or the job of a cluster may still take: Linux's control groups (v2), this process's own and
    those above it. Files that were read and can be forgotten do not count as taken."""
    group, left = root / _own_group(), []
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
            left.append(int(limit.read_text()) - taken)
    return left


def _own_group() -> str:
    """Below the root of the control groups: `` in a container."""
    return Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
