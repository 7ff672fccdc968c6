"""The seam to mosaicml-streaming: reading token shards (MDS), each rank its own part. `data.shard_writer` writes them.

streaming is imported in these two and nowhere else.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from streaming import LocalDataset, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import prefix as streaming_prefix

from model import artifact

INDEX = "index.json"
SHARED_MEMORY = Path("/dev/shm")
NO_CAPTIONS = "[]"
JOB_NAME = "stretto-"
LOCK = ".lock"


def count_records(folder: Path) -> int:
    """How many records the shards of `folder` hold."""
    return sum(shard["samples"] for shard in json.loads((folder / INDEX).read_text())["shards"])


def first_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` records of `folder`, or all where there are fewer, read by this process alone."""
    records = LocalDataset(str(folder))
    return [records[number] for number in range(min(count, len(records)))]


def check_shards(tokens: Path, rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's share of the files of the token artifact `tokens`, in words that name them.

    Each rank digests every `world_size`-th file, so all ranks together read each file once; the reader must bring
    their findings together. Raises UserError where `tokens` is no artifact.
    """
    return artifact.problems(artifact.read(tokens, "tokens"), share=(rank, world_size))


class Shards(StreamingDataset):
    """The records of local shards, each passed through `cut(record, epoch)`, in an order drawn by `seed` and the epoch.

    Each rank, and on it each loader worker, iterates over a part of its own; all ranks must start an epoch together.
    An epoch has `records` records over all ranks: with fewer than there are, some others are left out each time; with
    more, some come twice. Any `n` records that follow each other in that order are the next of all ranks together,
    however many ranks and nodes they are and however large their batches, as long as these divide `n`.
    """

    def __init__(
        self,
        folder: Path,
        cut: Callable[[dict[str, Any], int], Any],
        *,
        records: int,
        batch: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        _claim_names()
        super().__init__(
            local=str(folder.absolute()),
            batch_size=batch,
            epoch_size=records,
            shuffle=shuffle,
            shuffle_algo="py1e",
            shuffle_seed=seed,
            sampling_method="balanced" if shuffle else "fixed",
            num_canonical_nodes=1,  # one order of all records; with more it would depend on the job's nodes
            # Its threads look this far ahead for shards to fetch. All are here, so let them look to the end and go:
            # a thread that waits for an epoch nobody finishes would keep the process from ending.
            predownload=max(records, batch),
        )
        self.cut = cut

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Nothing: the shards are local and stay. (The library would take a file lock for every record.)"""

    def __getitem__(self, at: Any) -> Any:
        record = super().__getitem__(at)
        if record["captions"] == NO_CAPTIONS:
            record["text_conditioning"] = record["text_conditioning"][:0]
        # next_epoch lies in memory that loader workers share; it is raised as an epoch starts.
        return self.cut(record, self.next_epoch - 1)

    def resume(self, epoch: int, records: int) -> None:
        """Lets the next iteration go on in `epoch`, after `records` records over all ranks. Every rank must call it."""
        self.next_epoch = epoch  # or else an earlier epoch than the present one would count as stale
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": records,
                "num_canonical_nodes": self.num_canonical_nodes,
                "shuffle_seed": self.shuffle_seed,
            }
        )


def world_size() -> int:
    """Ranks of this job, by the environment that streaming reads.

    Raises RuntimeError where its launcher left that incomplete: every rank would take itself for the first of its node.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and ("LOCAL_WORLD_SIZE" not in os.environ or not dist.is_initialized()):
        raise RuntimeError("Set LOCAL_WORLD_SIZE and initialise the process group before shards are opened.")
    return ranks


_job: str | None = None


def _claim_names() -> None:
    """Gives the shared memory and lock files of this job names that no other job has.

    streaming counts names up from 000000 for the whole machine, so jobs that start, or end, at the same moment trip
    over each other, and what a killed job leaves stays. Here the names begin with the job's own, and every process of a
    job holds a lock that the system lets go when it dies, however it dies: leftovers are the names whose lock is free.
    """
    global _job
    if _job is not None:
        return
    names = [f"{JOB_NAME}{os.getpid()}-{secrets.token_hex(4)}"]
    if world_size() > 1:
        dist.broadcast_object_list(names)
    _job = job = names[0]

    def path(prefix_int: int, name: str) -> str:
        return f"{job}-{prefix_int:06}_{name}"

    streaming_prefix._get_path = streaming_dataset._get_path = path
    if SHARED_MEMORY.is_dir():
        remove_leftovers()
        lock = (SHARED_MEMORY / f"{job}{LOCK}").open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)

        def leave() -> None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # not left to the end of the process: a loader worker may hold it open
            lock.close()
            remove_leftovers()  # of this job too, if this was its last process

        atexit.register(leave)


def remove_leftovers() -> None:
    """Removes the shared memory and lock files of jobs of ours that are dead. Another user's are not ours to remove."""
    for lock in SHARED_MEMORY.glob(f"{JOB_NAME}*{LOCK}"):
        with contextlib.suppress(FileNotFoundError, PermissionError), _free(lock) as free:
            if free:
                for folder in (Path(tempfile.gettempdir()), SHARED_MEMORY):
                    for path in folder.glob(f"{lock.name.removesuffix(LOCK)}-*"):
                        path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _free(lock: Path) -> Iterator[bool]:
    """Whether nobody holds `lock`; if so it is held meanwhile."""
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
