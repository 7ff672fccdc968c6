"""Shards in place, and shards that are fetched, checked and unpacked into a cache: streams of mosaicml-streaming."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader, reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.util import retry
from streaming.base.world import World

from data.bucket import FAILURES
from data.token_corpus import HASH, INDEX, TokenCorpus
from model import artifact
from model.errors import UserError

ATTEMPTS = 4
BACKOFF_SECONDS = 1.0
"""Before a fetch that failed is tried again; twice as long each time."""
READS = 2
"""How often a shard is fetched that comes damaged."""
PARTIAL = ".partial"


class InPlaceStream(Stream):
    """Shards that are read where they lie. The cache neither counts them nor may remove them: to it they are never
    there (streaming would delete the only copy of local shards to make room)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(local=str(folder.absolute()))

    def prepare_shard(self, shard: Reader) -> int:
        return 0

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        cache_usage_per_shard[:] = 0

    def get_index_size(self) -> int:
        return 0


class CachedStream(Stream):
    """Shards that come from a bucket or are compressed: fetched, checked and unpacked into `folder` when needed.

    A file there under a shard's name is whole and checked, whenever a process was killed.
    """

    def __init__(self, corpus: TokenCorpus, split: str, folder: Path) -> None:
        self.place = corpus.place(split)
        super().__init__(remote=self.place, local=str(folder.absolute()), validate_hash=HASH, keep_zip=False)
        self._corpus, self._split, self._folder = corpus, split, folder

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """By the corpus's own index, of which the cache has no copy that could be an earlier one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        shards = [reader_from_json(self.local, None, entry) for entry in self._corpus.index(self._split)]
        for shard in shards:
            shard.validate(allow_unsafe_types)
        return shards

    def get_index_size(self) -> int:
        return 0

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Finds what an earlier job has left, and removes what is no whole shard."""
        expected = {shard.file_pairs[0][0].basename: number for number, shard in enumerate(shards)}
        cache_usage_per_shard[:] = 0
        for path in self._folder.iterdir():
            number = expected.get(path.name)
            if number is not None and path.stat().st_size == shards[number].get_raw_size():
                cache_usage_per_shard[number] = shards[number].get_raw_size()
            else:
                path.unlink()

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Bytes that the cache has grown by. Raises UserError where the shard cannot be had whole."""
        path = self._folder / raw_info.basename
        if path.exists():
            return 0
        stored = zip_info or raw_info
        data = self._fetch(stored)
        if data is None:
            raise UserError(
                f"the shard {self.place}/{stored.basename} is damaged: fetched {READS} times, it never had the size "
                f"and {HASH} that its index gives.\nPut a whole copy there, or make the tokens anew."
            )
        partial = path.with_name(f"{path.name}{PARTIAL}")
        partial.write_bytes(decompress(compression, data) if compression else data)
        partial.replace(path)
        return raw_info.bytes

    def _fetch(self, info: FileInfo) -> bytes | None:
        """What is stored of a shard; None where it comes damaged each time."""
        name = f"{info.basename}{PARTIAL}"
        for _ in range(READS):
            path = self._folder / name
            path.unlink(missing_ok=True)
            self._download(info.basename, path)
            data = path.read_bytes()
            path.unlink()
            hash_ = info.hashes.get(HASH)
            if len(data) == info.bytes and (hash_ is None or get_hash(HASH, data) == hash_):
                return data
        return None

    def _download(self, name: str, path: Path) -> None:
        address = f"{self.place}/{name}"
        download = retry(clean_up_fn=self._downloader.clean_up, num_attempts=ATTEMPTS, initial_backoff=BACKOFF_SECONDS)(
            lambda: self._downloader.download(address, str(path), self.download_timeout)
        )
        try:
            download()
        except (*FAILURES, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"the shard {address} could not be fetched in {ATTEMPTS} attempts: {error}") from None


def open_stream(corpus: TokenCorpus, split: str, cache: Path | None) -> Stream:
    """A split of a corpus: cached in a folder of its own below `cache`, or in place."""
    if not corpus.cached(split):
        return InPlaceStream(corpus.folder / split)
    if cache is None:
        raise ValueError(f"the shards of {corpus.address} need a cache")
    return CachedStream(corpus, split, cache_folder(corpus, split, cache))


def cache_folder(corpus: TokenCorpus, split: str, cache: Path) -> Path:
    return cache / corpus.fingerprint / split


def fetch_split(corpus: TokenCorpus, split: str, cache: Path) -> None:
    """Brings all shards of a split into its folder below `cache`, unpacked, with an index to read them in place by. One
    process at a time may do so."""
    stream = open_stream(corpus, split, cache)
    stream.apply_default({"split": None, "download_retry": ATTEMPTS, "download_timeout": 60.0, "keep_zip": False})
    shards = stream.get_shards(World(1, 1, 1, 0), False)
    stream.set_up_local(shards, np.zeros(len(shards), np.int64))
    for shard in shards:
        stream.prepare_shard(shard)
    entries = [{**entry, "zip_data": None, "compression": None} for entry in corpus.index(split)]
    artifact.write_json(cache_folder(corpus, split, cache) / INDEX, {"version": 2, "shards": entries})


def largest_shard(corpora: Sequence[TokenCorpus], split: str) -> int:
    """Bytes that a shard takes while it is unpacked, at most."""
    entries = [entry for corpus in corpora for entry in corpus.index(split)]
    return max(entry["raw_data"]["bytes"] + (entry["zip_data"] or {"bytes": 0})["bytes"] for entry in entries)


def fetches_at_once(workers: int) -> int:
    """Shards that the processes of this node may be fetching at one time, with so many loader workers a rank: each the
    next one, and one that was removed before it was read."""
    return 2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, workers)


def least_cache(corpora: Sequence[TokenCorpus], split: str, workers: int) -> int:
    """Bytes below which a cache would remove what is about to be read: of shards four, which streaming asks for, and
    for each process those it fetches and as many that it reads."""
    return (4 + 2 * fetches_at_once(workers)) * largest_shard(corpora, split)
