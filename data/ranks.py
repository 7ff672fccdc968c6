"""The processes that fit quantizers and tokenise together: who this one is, and the few things they do in common.

They talk over gloo: what they exchange is small beside what they compute.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from data.network import use_interface

log = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=24)
"""Ranks wait for the slowest; when one is lost, the launcher ends them all. This guards against our own faults."""


class Ranks:
    """This process among those of its job, which may be the only one."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Joins the ranks that a launcher started, by the environment it gave them; alone where there is none.

        Each rank takes a GPU of its own where there are any.
        """
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        if interface := use_interface():
            log.info("reaching the other nodes through network interface %s", interface)
        distributed.init_process_group("gloo", timeout=TIMEOUT)
        try:
            yield cls(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Adds up `values`, which lie in host memory and have one shape on all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gave, in their order. It travels pickled: for small plain values of our own."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gave."""
        box = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()
