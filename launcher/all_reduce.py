"""`python -m launcher.all_reduce`: two processes add up numbers, and say how fast: both on this machine, or with
`--rank` one here and the other on another host.

For `stretto doctor`: what a run does first, and hangs at where the network is set up wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from data.network import use_interface
from launcher.port_check import listen

NUMBERS = {"gloo": 1 << 22, "nccl": 1 << 26}
TIMES = 5
MEET = timedelta(seconds=60)


def add_up(rank: int, address: str, port: int, backend: str = "gloo", local_ranks: int = 2) -> tuple[int, float]:
    """The bytes that are added up by two ranks that meet at `address`, and the seconds it takes."""
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE=str(local_ranks),
    )
    use_interface()
    dist.init_process_group(backend, timeout=MEET)
    values = torch.ones(NUMBERS[backend], device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(values)
    _finish(backend)
    started = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(values)
    _finish(backend)
    seconds = (time.perf_counter() - started) / TIMES
    if not torch.equal(values, torch.full_like(values, 2.0 ** (TIMES + 1))):
        sys.exit("the sum is wrong")
    dist.destroy_process_group()
    return values.nbytes, seconds


def _finish(backend: str) -> None:
    if backend == "nccl":
        torch.cuda.synchronize()


def _on_this_machine(rank: int, port: int) -> None:
    count, seconds = add_up(rank, "127.0.0.1", port)
    if rank == 0:
        print(f"they add up {count / 1e6:.0f} MB in {1000 * seconds:.0f} ms, {count / seconds / 1e9:.1f} GB/s")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, choices=(0, 1), help="One of two; both on this machine when not given.")
    parser.add_argument("--address", help="Where rank 0 is.")
    parser.add_argument("--port", type=int)
    parser.add_argument("--backend", choices=tuple(NUMBERS), default="gloo")
    arguments = parser.parse_args()
    if arguments.rank is None:
        with listen("127.0.0.1") as found:
            port = found.getsockname()[1]
        mp.spawn(_on_this_machine, (port,), nprocs=2)
        return 0
    try:
        count, seconds = add_up(arguments.rank, arguments.address, arguments.port, arguments.backend, local_ranks=1)
    except RuntimeError as error:  # torch's errors of networks are such
        print(json.dumps({"error": str(error).splitlines()[0]}))
        return 0
    print(json.dumps({"bytes": count, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
