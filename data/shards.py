"""The seam to mosaicml-streaming: reading token shards (MDS), each rank its own part. `data.shard_writer` writes them.

streaming is imported in `data.*shard*` and in `data.shared_names`, and nowhere else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import LocalDataset, StreamingDataset
from streaming.base.dataset import _ShardState

from data.epochs import Epochs
from data.shard_cache import InPlaceStream, fetches_at_once, largest_shard, open_stream
from data.shard_world import claim_world
from data.shared_names import claim_names
from data.token_corpus import TokenCorpus
from model.errors import UserError

NO_CAPTIONS = "[]"
SHARDS_AHEAD = 2
"""Shards that a process fetches before it needs them."""
RECORDS_AHEAD = 1024
"""How far it looks for them."""


def first_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` records of `folder`, or all where there are fewer, read by this process alone."""
    records = LocalDataset(str(folder))
    return [_without_padding(records[number]) for number in range(min(count, len(records)))]


def _without_padding(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was given to be written."""
    if record["captions"] == NO_CAPTIONS:
        record["text_conditioning"] = record["text_conditioning"][:0]
    return record


Cut = Callable[[dict[str, Any], int, str], Any]
"""What is made of a record, given the epoch and the key by which all that is random about it is drawn."""


class Shards(StreamingDataset):
    """The records of one split of some corpora, each passed through `cut(record, epoch, key)`, as `epochs` has them.

    Each rank, and on it each loader worker, iterates over a part of its own; all ranks must start an epoch together.
    Any `n` records that follow each other in an epoch are the next of all ranks together, however many ranks and nodes
    they are and however large their batches, as long as these divide `n`.

    Shards that are cached go to `cache`, whose folder is this dataset's alone, and of them at most `cache_limit` bytes
    stay there. The key of a record is its id, in corpora after the first with the corpus's fingerprint, and where it
    comes again within an epoch with the number of times before.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        split: str,
        cut: Cut,
        epochs: Epochs,
        *,
        batch: int,
        workers: int = 0,
        cache: Path | None = None,
        cache_limit: int | None = None,
    ) -> None:
        claim_names()
        claim_world()
        streams = [open_stream(corpus, split, cache) for corpus in corpora]
        self.cut, self.epochs = cut, epochs
        self._origins = ["", *(f"{corpus.fingerprint} " for corpus in corpora[1:])]
        self._in_place = [isinstance(stream, InPlaceStream) for stream in streams]
        if cache_limit is not None:
            if all(self._in_place):
                raise ValueError("a cache limit without shards that are cached")
            # streaming counts a shard once it is there, not while it is being fetched.
            cache_limit -= fetches_at_once(workers) * largest_shard(corpora, split)
        super().__init__(
            streams=streams,
            batch_size=batch,
            shuffle=False,  # `epochs` says what comes when
            num_canonical_nodes=1,  # one order of all records; with more it would depend on the job's nodes
            cache_limit=cache_limit,
        )
        if cache_limit is not None and self._unique_rank_world.is_local_leader:
            while self.cache_usage > cache_limit:  # an earlier job's was higher
                self.evict_coldest_shard()

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """What streaming asks for the records of an epoch. It shuffles nothing, so that sizes of shards do not matter;
        and it looks at `epoch_size` next, which is each epoch's own."""
        numbers = self.epochs.draw(epoch)
        self.epoch_size = len(numbers)
        return np.empty(0, np.int64), numbers

    def __iter__(self) -> Iterator[Any]:
        """streaming's own would end an epoch early, without a word, when a shard cannot be fetched."""
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        epoch, records = self._resume_incr_epoch()
        numbers = self._get_work(epoch, records)
        for number in self._fetched(numbers[numbers >= 0]):
            again, place = divmod(int(number), self.num_samples)
            record = _without_padding(self.get_item(place))
            origin = self._origins[self.stream_per_shard[self.spanner[place][0]]]
            yield self.cut(record, epoch, f"{origin}{record['id']}" + (f" {again}" if again else ""))

    def _fetched(self, numbers: NDArray[np.int64]) -> Iterator[int]:
        """`numbers`, each once its shard is there, while those of the next ones are fetched."""
        if all(self._in_place):
            yield from numbers
            return
        waiting: deque[tuple[int, int]] = deque()
        fetching: dict[int, Future[None]] = {}
        pool = ThreadPoolExecutor(1, "shards")

        def first() -> int:
            number, shard = waiting.popleft()
            if shard in fetching:
                fetching.pop(shard).result()
            return number

        try:
            for number in numbers:
                shard = int(self.spanner[int(number) % self.num_samples][0])
                missing = shard not in fetching and not self._there(shard)
                while len(waiting) >= RECORDS_AHEAD or (missing and len(fetching) >= SHARDS_AHEAD):
                    yield first()
                if missing:
                    fetching[shard] = pool.submit(self.prepare_shard, shard)
                waiting.append((number, shard))
            while waiting:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)

    def _there(self, shard: int) -> bool:
        """Whether a shard can be read now; one that can is kept for longer."""
        if self._in_place[self.stream_per_shard[shard]]:
            return True
        if self._shard_states[shard] != _ShardState.LOCAL:
            return False
        self._shard_access_times[shard] = time.time_ns()
        return True

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Sees to it that a shard is in the cache. Where it cannot be had, streaming alone would let others that need
        it wait for ever."""
        if self._in_place[self.stream_per_shard[shard_id]]:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except (UserError, OSError):
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

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
