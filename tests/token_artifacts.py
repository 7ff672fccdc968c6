"""Token artifacts of a few small shards, in folders and in a bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from buckets import BUCKET
from streaming import MDSWriter

from data import shard_writer
from data.shard_cache import least_cache
from data.shards import first_records
from data.token_corpus import TokenCorpus
from model import artifact
from model.fields import TokenField

SECONDS = 4.0
FIELDS = [
    TokenField("semantic", 10.0, 1, 60_000),
    TokenField("acoustic", 20.0, 2, 1000),
    TokenField("conditioning", 1.0, 1, 60_000),
]
RECORDS_A_SHARD = 10
INPUTS = {"codec": "c", "embedding": "e", "quantizers": "q"}


def record(number: int) -> dict[str, Any]:
    """Its semantic codes are its number; its acoustic codes say the frame."""
    return {
        "id": f"clip-{number}",
        "captions": "[]",
        "conditioning": np.full((4, 1), number, np.uint16),
        "semantic": np.full((40, 1), number, np.uint16),
        "acoustic": np.repeat(np.arange(80)[:, None], 2, 1).astype(np.uint16),
        "text_conditioning": np.zeros((1, 1), np.uint16),
    }


def write_tokens(
    folder: Path,
    numbers: Sequence[int],
    *,
    fingerprint: str = "own",
    columns: dict[str, Sequence[Any]] | None = None,
    compression: str | None = None,
    remote: str | None = None,
    inputs: dict[str, str] | None = None,
    **info: Any,
) -> Path:
    """The artifact `folder` with clips of these numbers to train on and four to validate on."""
    with artifact.create(folder, "tokens", fingerprint, inputs or INPUTS) as (path, said):
        validation = range(50_000, 50_004)
        for split, part in (("train", numbers), ("validation", validation)):
            with MDSWriter(
                out=str(path / split),
                columns=shard_writer.COLUMNS,
                compression=compression,
                hashes=["sha1", "xxh64"],
                size_limit=RECORDS_A_SHARD * 560,
            ) as writer:
                for number in part:
                    writer.write(record(number))
            values = {"seconds": [SECONDS] * len(part), **(columns if split == "train" and columns else {})}
            (path / split / "columns.json").write_text(json.dumps(values))
        said |= {
            "fields": {field.name: field.to_json() for field in FIELDS},
            "clip_seconds": SECONDS,
            "hop_seconds": 1.0,
            "embedding_seconds": 1.0,
            "captions": False,
            "records": {"train": len(numbers), "validation": 4},
            "remote": remote,
            **info,
        }
    return folder


def upload(s3: Any, folder: Path, prefix: str, keep_shards: bool = False) -> str:
    """Copies an artifact to the bucket and takes its shards out of the folder. Returns where it is."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        if ".mds" in path.name and not keep_shards:
            path.unlink()
    return f"s3://{BUCKET}/{prefix}"


def read(folder: Path, remote: str | None = None) -> TokenCorpus:
    return replace(TokenCorpus.read(folder), remote=remote)


def held(folder: Path) -> int:
    """Bytes of the files below `folder`, some of which may go meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def rewrite_small(tokens: Path) -> None:
    """The same records, each four times, in shards of about five, hashed as a tokenising to a bucket writes them."""
    found = artifact.read(tokens)
    counts = {}
    for split in ("train", "validation"):
        once = first_records(tokens / split, 10_000)
        records = [{**one, "id": f"{one['id']}-{copy}"} for copy in range(4) for one in once]
        for path in (tokens / split).iterdir():
            path.unlink()
        size = 5 * sum(value.nbytes for value in records[0].values() if isinstance(value, np.ndarray))
        with MDSWriter(
            out=str(tokens / split), columns=shard_writer.COLUMNS, hashes=["sha1", "xxh64"], size_limit=size
        ) as writer:
            for one in records:
                writer.write(one)
        columns = {"seconds": [SECONDS] * len(records)}
        (tokens / split / "columns.json").write_text(json.dumps(columns))
        counts[split] = len(records)
    (tokens / artifact.MANIFEST).unlink()
    artifact.write_manifest(tokens, "tokens", found.fingerprint, {}, {**found.info, "records": counts})


def validation_bytes(tokens: Path) -> int:
    return sum(entry["raw_data"]["bytes"] for entry in read(tokens).index("validation"))


def least_limit(tokens: Path, ranks: int) -> int:
    """The smallest cache limit of a stage that so many ranks of this machine train on `tokens` alone."""
    return validation_bytes(tokens) + least_cache([read(tokens)], "train", ranks)
