"""Which corpora a stage is trained on: what is checked before the first step, and a training by way of a bucket."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import token_artifacts
from buckets import BUCKET, environment
from ranks import run_ranks, start_ranks
from token_artifacts import held, upload, write_tokens
from training_runs import change, job, make_run, rows, train_all, weights_digest

from data import shared_names
from model import artifact
from model.errors import UserError
from trainer.batches import open_loader
from trainer.config import StageConfig, TrainConfig
from trainer.corpora import mixture, prepare
from trainer.setup import StageSetup

SHORT = {"steps": 10, "warmup_steps": 2, "log_every": 1, "validate_every": 5, "checkpoint_every": 2}


@dataclass
class OneRank:
    """What `prepare` asks of an engine."""

    rank: int = 0
    world_size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_names, "_job", None)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A run folder with tokens of its own."""
    write_tokens(tmp_path / "run" / "tokens", range(40), columns={"genre": ["a", "b"] * 20})
    return tmp_path / "run"


def setup_of(run: Path, **train: Any) -> StageSetup:
    model = {"field": "acoustic", "window_seconds": 1.0, "transformer": {"dim": 32, "layers": 1, "heads": 1}}
    train = {"ranks": 1, "global_batch": 4, **train}
    config = StageConfig.model_validate({"model": model, "train": train})
    return StageSetup(run, "coarse", config, 0, {}, False, "f", "t")


def refused(run: Path, **train: Any) -> str:
    with pytest.raises(UserError) as found:
        prepare(setup_of(run, **train), OneRank())  # type: ignore[arg-type]
    return str(found.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hop_seconds": 2.0}, "hop_seconds is 1 in the first and 2 in the other"),
        ({"embedding_seconds": 5.0}, "embedding_seconds is 1 in the first and 5 in the other"),
        ({"inputs": {"codec": "c", "embedding": "e", "quantizers": "other"}}, "the quantizers that made them differs"),
        ({"inputs": {"codec": "other", "embedding": "e", "quantizers": "q"}}, "the codec that made them differs"),
        ({"fields": {"semantic": {"rate_hz": 50.0}}}, "rate_hz of semantic is 10.0 in the first and 50.0 in the other"),
        ({"fingerprint": "own"}, "they are the same tokens"),
    ],
)
def test_tokens_that_do_not_go_together(own: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), **{"fingerprint": "other", **change})
    message = refused(own, mix=[{"tokens": str(other)}])
    assert f"{own / 'tokens'} and {other} cannot be mixed" in message
    assert words in message


def test_tokens_that_are_not_there(own: Path, tmp_path: Path, s3: Any) -> None:
    assert "no manifest.json" in refused(own, mix=[{"tokens": str(tmp_path / "nowhere")}])
    assert "holds no token artifact" in refused(own, mix=[{"tokens": f"s3://{BUCKET}/nowhere"}])
    assert "holds no token artifact" in refused(own, mix=[{"tokens": "s3://no-such-bucket/tokens"}])


def test_tokens_of_a_later_version_are_refused_wherever_they_are(own: Path, tmp_path: Path, s3: Any) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), fingerprint="other")
    manifest = json.loads((other / artifact.MANIFEST).read_text())
    artifact.write_json(other / artifact.MANIFEST, {**manifest, "format_version": 2})
    for address in (str(other), upload(s3, other, "later")):
        message = refused(own, mix=[{"tokens": address}])
        assert f"train.mix: {address} has format version 2; this Stretto reads up to 1: upgrade it." in message


def test_a_run_folder_stands_for_its_tokens(own: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "other" / "tokens", range(100, 120), fingerprint="other")
    setup = setup_of(own, mix=[{"tokens": str(tmp_path / "other"), "weight": 3.0}], own_weight=2.0)
    prepare(setup, OneRank())  # type: ignore[arg-type]
    found = mixture(setup)
    assert [corpus.fingerprint for corpus in found.corpora] == ["own", "other"]
    assert found.phases[0].weights == (2.0, 3.0)


def test_a_curriculum_says_what_each_phase_draws_from(own: Path, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), fingerprint="other", columns={"genre": ["b"] * 20})
    phases = [{"steps": 3, "weights": [1, 0]}, {"filter": {"seconds": {"min": 1}}}]
    setup = setup_of(own, mix=[{"tokens": str(other)}], filter={"genre": "b"}, curriculum=phases)
    windows = open_loader(setup, "train", 4, 0.0)
    steps = [batch["acoustic"].shape[0] for batch in windows]
    assert steps == [4] * 3
    first, last = mixture(setup).phases
    assert (first.weights, first.steps) == ((1.0, 0.0), 3)
    assert (last.weights, last.steps) == ((1.0, 1.0), None)
    assert len(windows) == (20 + 20) // 4
    with pytest.raises(UserError, match=r"20 clips are left to train on in phase 1 .* fewer than the 24"):
        open_loader(setup_of(own, **{**setup.config.train.model_dump(), "global_batch": 24}), "train", 24, 0.0)


def test_one_corpus_named_twice(own: Path, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), fingerprint="other")
    assert "names the same tokens twice" in refused(own, mix=[{"tokens": str(other)}] * 2)


def test_an_index_that_does_not_match_its_shards(own: Path, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), fingerprint="other")
    (other / "train" / "shard.00001.mds").unlink()
    message = refused(own, mix=[{"tokens": str(other)}])
    assert "index does not match its shards" in message
    assert f"{other}/train/shard.00001.mds is missing" in message


def test_a_damaged_shard_of_a_corpus_that_is_mixed_in(own: Path, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", range(100, 120), fingerprint="other")
    path = other / "train" / "shard.00001.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert f"{path} has changed" in refused(own, mix=[{"tokens": str(other)}])


def test_a_cache_limit_without_anything_to_cache(own: Path) -> None:
    assert "train.cache_limit is set, but no corpus is in a bucket" in refused(own, cache_limit="20gb")


def test_a_cache_limit_that_is_too_small(own: Path, s3: Any) -> None:
    upload(s3, own / "tokens", "tokens")
    manifest = json.loads((own / "tokens" / artifact.MANIFEST).read_text())
    manifest["info"]["remote"] = f"s3://{BUCKET}/tokens"
    (own / "tokens" / artifact.MANIFEST).write_text(json.dumps(manifest))
    message = refused(own, cache_limit="10kb")
    assert "train.cache_limit is 10,000 bytes, too small" in message
    assert "it must be at least" in message
    prepare(setup_of(own, cache_limit="1mb"), OneRank())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_limit": "much"}, "cache_limit 'much' must be a number of bytes, or one such as 20gb"),
        ({"cache_limit": "0gb"}, "more than 0"),
        ({"curriculum": [{"steps": 5}]}, "the last has none"),
        ({"curriculum": [{}, {}]}, "all phases of curriculum but the last need steps"),
        ({"curriculum": [{"steps": 1000}, {}]}, "begin after the last of the 1000 steps"),
        ({"curriculum": [{"weights": [1.0, 1.0]}]}, "must be 1 numbers"),
        ({"filter": {"year": {"min": 3, "max": 2}}}, "min 3 must be at most max 2"),
        ({"filter": {"year": {}}}, "a range needs min, max or both"),
    ],
)
def test_keys_that_contradict_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_sizes_in_words() -> None:
    sizes = {"20gb": 20_000_000_000, "1.5 MB": 1_500_000, "300": 300, 7: 7, None: None}
    assert {given: TrainConfig(cache_limit=given).cache_bytes for given in sizes} == sizes


def to_bucket(s3: Any, run: Path, prefix: str) -> Path:
    """The run's tokens in the bucket in place of its folder, which keeps what describes them."""
    tokens = run / "tokens"
    info = artifact.read(tokens).info
    index = {split: json.loads((tokens / split / "index.json").read_text()) for split in ("train", "validation")}
    assert all(entry["raw_data"]["hashes"].keys() >= {"xxh64"} for part in index.values() for entry in part["shards"])
    names = [f"{split}/{name}" for split in index for name in ("index.json", "columns.json")]
    upload(s3, tokens, prefix)
    described = {**info, "remote": f"s3://{BUCKET}/{prefix}"}
    artifact.write_manifest(tokens, "tokens", "t", {}, described, names)
    return run


@pytest.fixture
def run_in_a_bucket(s3: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A run that trains on tokens in a bucket, and the same one with all in place."""
    here = make_run(tmp_path / "here", **SHORT, ranks=2, global_batch=8, shuffle_block=10)
    token_artifacts.rewrite_small(here / "tokens")
    there = shutil.copytree(here, tmp_path / "there")
    return to_bucket(s3, there, "tokens"), here


def test_a_stage_trained_from_a_bucket_is_killed_and_goes_on(
    run_in_a_bucket: tuple[Path, Path], tmp_path: Path
) -> None:
    there, here = run_in_a_bucket
    run_ranks(train_all, 2, tmp_path / "log", here)
    total = sum(file["raw_data"]["bytes"] for file in token_artifacts.read(there / "tokens").index("train"))
    limit = token_artifacts.least_limit(there / "tokens", ranks=2)
    assert limit < total + token_artifacts.validation_bytes(there / "tokens")
    change(there, cache_limit=limit)
    running = start_ranks(job, 2, tmp_path / "killed", there, **environment())
    deadline = time.monotonic() + 90
    while not (there / "coarse" / "checkpoints" / "step-00000004").exists():
        assert running.alive(), running.output()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send(signal.SIGKILL)
    running.wait()
    assert not (there / "coarse" / artifact.MANIFEST).exists()
    assert held(there / "cache") <= limit
    again = start_ranks(job, 2, tmp_path / "again", there, **environment())
    assert again.wait() == [0, 0], again.output()
    assert held(there / "cache") <= limit
    assert weights_digest(there) == weights_digest(here)
    assert [row["loss"] for row in rows(there, "validation")][-1] == [row["loss"] for row in rows(here, "validation")][
        -1
    ]
