"""Which ranks share a machine, as mosaicml-streaming needs to know it: however many each has.

streaming takes all machines to have as many ranks as this one. Where they do not, it would leave out clips, or give
them to several ranks, without a word.
"""

from __future__ import annotations

import os

from streaming.base import dataset as streaming_dataset
from streaming.base.world import World


class JobWorld(World):
    """All ranks of a job as if on one machine, so that each has a part of its own. What the processes of one machine do
    together, through its memory, is left to those of this one."""

    def __init__(self, num_nodes: int, ranks_per_node: int, workers_per_rank: int, worker: int) -> None:
        super().__init__(1, int(os.environ.get("WORLD_SIZE", "1")), workers_per_rank, worker)
        self.workers_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * workers_per_rank
        self.is_local_leader = os.environ.get("LOCAL_RANK", "0") == "0" and self.worker_of_rank == 0

    def detect_workers(self) -> JobWorld:
        """What a loader worker is. streaming's own would be of its class again."""
        worker, workers = self._get_worker_info()
        return JobWorld(self.num_nodes, self.ranks_per_node, workers, self.rank * workers + worker)


def claim_world() -> None:
    """Lets streaming use it for every dataset that is opened from now on."""
    streaming_dataset.World = JobWorld  # type: ignore[misc]
