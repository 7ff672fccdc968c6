"""`python -m launcher.all_reduce`: two processes on this machine add up numbers, and say how fast.

For `stretto doctor`: what a run does first, and hangs at where the network is set up wrongly.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launcher.processes import free_port

NUMBERS = 1 << 22
TIMES = 5


def rank(number: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    values = torch.ones(NUMBERS)
    dist.all_reduce(values)
    started = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(values)
    seconds = (time.perf_counter() - started) / TIMES
    if not torch.equal(values, torch.full_like(values, 2.0 ** (TIMES + 1))):
        sys.exit("the sum is wrong")
    if number == 0:
        megabytes = 4 * NUMBERS / 1e6
        print(f"they add up {megabytes:.0f} MB in {1000 * seconds:.0f} ms, {megabytes / seconds / 1000:.1f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank, (free_port(),), nprocs=2)
