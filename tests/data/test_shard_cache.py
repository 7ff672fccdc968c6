"""Shards in a bucket, which S3 plays as moto's server, and compressed ones: read by way of a bounded cache."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from buckets import BUCKET, environment
from ranks import run_ranks, start_ranks
from token_artifacts import held, read, upload, write_tokens

from data import shard_cache, shared_names
from data.mixture import Mixture, Selection
from data.shard_cache import fetch_split, least_cache
from data.shards import first_records
from data.token_corpus import TokenCorpus, index_problems
from data.windows import WindowLoader, window_loader
from model.errors import UserError

CLIPS, BLOCK = 240, 30


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_names, "_job", None)
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.01)


def loader(corpora: list[TokenCorpus], cache: Path | None, batch: int = 12, **options: Any) -> WindowLoader:
    mixture = Mixture(tuple(corpora), (Selection((1.0,) * len(corpora)),), BLOCK)
    options = {"seed": 1, "global_batch": 12, **options}
    return window_loader(mixture, "train", ["semantic", "acoustic"], 1.0, batch=batch, cache=cache, **options)


def windows(found: WindowLoader) -> list[list[tuple[int, int]]]:
    return [
        list(zip(*(batch[name][:, 0, 0].tolist() for name in ("semantic", "acoustic")), strict=True)) for batch in found
    ]


class Watch:
    """The most bytes that a folder held while the test ran."""

    def __init__(self, folder: Path) -> None:
        self.most, self._folder, self._end = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(0.001):
            self.most = max(self.most, held(self._folder))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def stored(s3: Any, tmp_path: Path) -> tuple[TokenCorpus, Path]:
    """A corpus in the bucket, and the same in a folder."""
    folder = write_tokens(tmp_path / "tokens", range(CLIPS))
    whole = write_tokens(tmp_path / "whole", range(CLIPS))
    return read(folder, upload(s3, folder, "tokens")), whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_the_windows_of_the_folder_through_a_small_cache(
    stored: tuple[TokenCorpus, Path], tmp_path: Path, workers: int
) -> None:
    remote, whole = stored
    here = loader([read(whole)], None)
    cache = tmp_path / "cache"
    limit = least_cache([remote], "train", workers)
    assert limit < sum(entry["raw_data"]["bytes"] for entry in remote.index("train"))
    there = loader([remote], cache, workers=workers, cache_limit=limit)
    with Watch(cache) as watch:
        for _ in range(2):
            assert windows(there) == windows(here)
    there.close()
    assert 0.2 * limit < watch.most <= limit


def test_local_shards_stay_where_a_cache_is_too_small_for_all(stored: tuple[TokenCorpus, Path], tmp_path: Path) -> None:
    remote, _ = stored
    local = write_tokens(tmp_path / "local", range(1000, 1000 + CLIPS), fingerprint="local")
    before = held(local)
    found = loader([read(local), remote], tmp_path / "cache", cache_limit=least_cache([remote], "train", 0))
    assert {clip < 1000 for batch in windows(found) for clip, _ in batch} == {True, False}
    assert held(local) == before
    assert read(local).damage() == []


@pytest.mark.parametrize("remote", [False, True])
def test_compressed_shards(s3: Any, tmp_path: Path, remote: bool) -> None:
    folder = write_tokens(tmp_path / "tokens", range(CLIPS), compression="zstd")
    whole = write_tokens(tmp_path / "whole", range(CLIPS))
    corpus = read(folder, upload(s3, folder, "tokens") if remote else None)
    before = held(folder)
    found = loader([corpus], tmp_path / "cache", cache_limit=least_cache([corpus], "train", 0))
    assert windows(found) == windows(loader([read(whole)], None))
    assert held(folder) == before
    fetch_split(corpus, "validation", tmp_path / "cache")
    records = first_records(tmp_path / "cache" / "own" / "validation", 9)
    assert [record["id"] for record in records] == [f"clip-{number}" for number in range(50_000, 50_004)]


def cut_short(data: bytes) -> bytes:
    return data[:-7]


def flip_one_bit(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [cut_short, flip_one_bit])
def test_a_damaged_shard_is_named(
    s3: Any, stored: tuple[TokenCorpus, Path], tmp_path: Path, damage: Callable[[bytes], bytes], workers: int
) -> None:
    key = "tokens/train/shard.00003.mds"
    data = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=damage(data))
    words = rf"^the shard s3://{BUCKET}/{key} is damaged: fetched 2 times"
    with (
        contextlib.closing(loader([stored[0]], tmp_path / "cache", workers=workers)) as broken,
        pytest.raises(UserError, match=words) as found,
    ):
        windows(broken)
    assert "Traceback" not in str(found.value)


def test_a_shard_that_is_damaged_on_its_way_is_fetched_again(
    stored: tuple[TokenCorpus, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_stored, damaged = shard_cache.stored_bytes, []

    def badly(address: str) -> bytes:
        content = read_stored(address)
        if address in damaged:
            return content
        damaged.append(address)
        return flip_one_bit(content)

    monkeypatch.setattr(shard_cache, "stored_bytes", badly)
    found = loader([stored[0]], tmp_path / "cache")
    assert windows(found) == windows(loader([read(stored[1])], None))
    assert len(damaged) == len(stored[0].index("train"))


def test_a_shard_that_is_gone_is_named(s3: Any, stored: tuple[TokenCorpus, Path], tmp_path: Path) -> None:
    key = "tokens/train/shard.00003.mds"
    s3.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(UserError, match=rf"the shard s3://{BUCKET}/{key} could not be fetched in 4 attempts"):
        windows(loader([stored[0]], tmp_path / "cache"))


def test_what_a_killed_job_left_in_the_cache(stored: tuple[TokenCorpus, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "own" / "train"
    folder.mkdir(parents=True)
    for name, content in (("shard.00001.mds", b"half"), ("shard.00002.mds.partial", b"half"), ("other", b"x")):
        (folder / name).write_bytes(content)
    assert windows(loader([stored[0]], tmp_path / "cache")) == windows(loader([read(stored[1])], None))
    assert {path.name for path in folder.iterdir()} <= {f"shard.{number:05}.mds" for number in range(99)}


def steps_of(corpus: TokenCorpus, cache: Path, results: Path, done: int, workers: int, limit: int) -> None:
    """One rank of two, or the only one: writes the windows of each step after `done`, over three epochs."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    found = loader([corpus], cache, batch=12 // ranks, workers=workers, cache_limit=limit)
    epoch, batches = divmod(done, len(found))
    found.load_state_dict({"epoch": epoch, "records": batches * 12})
    with (results / f"steps-{rank}.jsonl").open("w") as file:
        while found.epoch < 3:
            for batch in found:
                pairs = [batch[name][:, 0, 0].tolist() for name in ("semantic", "acoustic")]
                print(json.dumps(list(zip(*pairs, strict=True))), file=file, flush=True)
                time.sleep(0.002)
    found.close()
    if ranks > 1:
        dist.destroy_process_group()


def read_steps(results: Path, ranks: int) -> Iterator[list[list[int]]]:
    files = [(results / f"steps-{rank}.jsonl").read_text().splitlines(keepends=True) for rank in range(ranks)]
    for lines in zip(*files, strict=False):
        if all(line.endswith("\n") for line in lines):
            yield sorted(window for line in lines for window in json.loads(line))


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_amid_an_epoch_it_goes_on_at_another_world_size(
    stored: tuple[TokenCorpus, Path], tmp_path: Path, workers: int
) -> None:
    remote, whole = stored
    here = loader([read(whole)], None)
    expected = [sorted(map(list, step)) for _ in range(3) for step in windows(here)]
    limit = least_cache([remote], "train", 2 * max(1, workers))  # of two ranks
    assert limit < sum(entry["raw_data"]["bytes"] for entry in remote.index("train"))
    cache, first = tmp_path / "cache", tmp_path / "first"
    arguments = (remote, cache, first, 0, workers, limit)
    with Watch(cache) as watch:
        job = start_ranks(steps_of, 2, first, *arguments, **environment())
        deadline = time.monotonic() + 60
        while len(list(first.glob("steps-?.jsonl"))) < 2 or len(list(read_steps(first, 2))) < 27:
            assert job.alive(), job.output()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        job.send(signal.SIGKILL)
        job.wait()
        seen = list(read_steps(first, 2))
        assert 27 <= len(seen) < len(expected)
        assert seen == expected[: len(seen)]
        run_ranks(
            steps_of, 1, tmp_path / "then", remote, cache, tmp_path / "then", len(seen), workers, limit, **environment()
        )
    assert list(read_steps(tmp_path / "then", 1)) == expected[len(seen) :]
    assert watch.most <= limit


@pytest.mark.parametrize("remote", [False, True])
def test_an_index_that_does_not_match_its_shards(s3: Any, tmp_path: Path, remote: bool) -> None:
    folder = write_tokens(tmp_path / "tokens", range(60))
    address = upload(s3, folder, "tokens", keep_shards=not remote) if remote else None
    assert list(index_problems(read(folder, address), "train")) == []

    index = json.loads((folder / "train" / "index.json").read_text())
    index["shards"][0]["raw_data"]["bytes"] += 1
    index["shards"][1]["samples"] -= 1
    index["shards"][2]["column_names"].remove("acoustic")
    index["shards"][3]["raw_data"]["hashes"].pop("xxh64")
    index["shards"][4]["raw_data"]["basename"] = "shard.00099.mds"
    (folder / "train" / "index.json").write_text(json.dumps(index))
    problems = "\n".join(index_problems(read(folder, address), "train"))
    place = f"{address}/train" if remote else str(folder / "train")
    assert f"{place}/shard.00000.mds has" in problems
    assert "counts 59 records, the manifest beside it 60" in problems
    assert "has 60 values of 'seconds' for 59 records" in problems
    assert f"{place}/shard.00002.mds has no column acoustic" in problems
    assert f"{place}/shard.00099.mds is missing" in problems
    assert ("shard.00003.mds was written without xxh64" in problems) == remote
    assert ("shard.00001.mds holds" in problems) != remote
