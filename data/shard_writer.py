"""Writing token shards (MDS), part by part: the half of the seam to mosaicml-streaming that `data.shards` reads with.

A part is a fixed stretch of a split's clips and becomes one shard. It is written by any process, under any name of its
own, and counts from the moment its commit record is there: what a killed process left is written again, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from data.cloud import objects, read, store
from data.token_corpus import COLUMNS_FILE, INDEX
from model import artifact
from model.errors import UserError

COLUMNS = {
    "id": "str",
    "captions": "str",
    "conditioning": "ndarray:uint16",
    "semantic": "ndarray:uint16",
    "acoustic": "ndarray:uint16",
    "text_conditioning": "ndarray:uint16",
}
"""What every record has; a tokenising step may add to it."""
HASHES = ["sha1", "xxh64"]
"""Of every shard, in the index: the first is a digest, the second quick enough to check at each fetch."""
LARGEST_SHARD = (1 << 32) - 1
"""Bytes: MDS counts them in 32 bits."""
Record = dict[str, Any]


class SplitWriter:
    """The shards of one split while they are made, in `folder`; with `remote` they move to that address when done.

    The commit records lie in `commits`. `columns` names what the records hold and how MDS stores it.
    """

    def __init__(
        self,
        folder: Path,
        commits: Path,
        columns: dict[str, str] = COLUMNS,
        compression: str | None = None,
        remote: str | None = None,
    ) -> None:
        self.folder, self.commits, self.columns = folder, commits, columns
        self.compression, self.remote = compression, remote
        folder.mkdir(parents=True, exist_ok=True)
        commits.mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[int]:
        """The numbers of the parts that are done."""
        return {int(path.stem) for path in self.commits.glob("*.json")}

    def write(
        self, number: int, records: Sequence[Record], rows: Sequence[dict[str, Any]], skipped: Sequence[Any] = ()
    ) -> None:
        """Makes part `number` of `records`: one shard, or none where there are no records.

        `rows` has the manifest columns of each record, `skipped` what the part lacks and why (JSON). Raises ValueError
        for a part that MDS cannot hold in one shard.
        """
        scratch = self.commits / f"part-{number:06d}-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        with MDSWriter(
            out=str(scratch),
            columns=self.columns,
            compression=self.compression,
            hashes=HASHES,
            size_limit=LARGEST_SHARD,
        ) as writer:
            for record in records:
                writer.write(_without_empty_arrays(record))
        shards = json.loads((scratch / INDEX).read_text())["shards"]
        if len(shards) > 1:
            raise ValueError(f"part {number} of {self.folder} does not fit into one shard: lower tokens.shard_seconds")
        commit: dict[str, Any] = {"shard": None, "rows": list(rows), "skipped": list(skipped)}
        if records:
            commit["shard"], commit["files"] = self._keep(scratch, number, shards[0])
        shutil.rmtree(scratch)
        artifact.write_json(self.commits / f"{number:06d}.json", commit)

    def _keep(self, scratch: Path, number: int, shard: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gives the one shard in `scratch` its name in the folder or at the remote; its index entry and its digests."""
        for data in filter(None, (shard["raw_data"], shard["zip_data"])):
            data["basename"] = data["basename"].replace("00000", f"{number:05d}")
        name = (shard["zip_data"] or shard["raw_data"])["basename"]
        path = self.folder / name
        next(scratch.glob("shard.*")).replace(path)
        if self.remote:
            upload(self.folder, self.remote, name)
            path.unlink()
            return shard, {}
        artifact.sync(path)
        return shard, artifact.describe_files(self.folder, [name])

    def close(self) -> tuple[dict[str, dict[str, Any]], list[Any]]:
        """Writes the index and the manifest columns of all parts, in their order.

        Returns the digests of the shards that lie in the folder, and what was skipped.
        """
        commits = [json.loads(path.read_text()) for path in sorted(self.commits.glob("*.json"))]
        shards = [commit["shard"] for commit in commits if commit["shard"]]
        artifact.write_json(self.folder / INDEX, {"version": 2, "shards": shards})
        rows = [row for commit in commits for row in commit["rows"]]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        (self.folder / COLUMNS_FILE).write_text(json.dumps(columns, ensure_ascii=False))
        if self.remote:
            upload(self.folder, self.remote, INDEX, COLUMNS_FILE)
        digests = {name: digest for commit in commits for name, digest in commit.get("files", {}).items()}
        return digests, [row for commit in commits for row in commit["skipped"]]


def write_records(folder: Path, records: Iterable[Record], rows: Sequence[dict[str, Any]] = ()) -> int:
    """Writes `records` as the new `folder`, of one shard, with their manifest columns, and returns their number."""
    all_records = list(records)
    with tempfile.TemporaryDirectory(dir=folder.parent) as commits:
        writer = SplitWriter(folder, Path(commits))
        writer.write(0, all_records, rows)
        writer.close()
    return len(all_records)


def upload(folder: Path, remote: str, *names: str) -> None:
    """Copies files of `folder` to the address `remote`. Raises UserError where that is refused or out of reach."""
    for name in names:
        try:
            store(folder / name, f"{remote}/{name}")
        except PermissionError as error:
            raise UserError(f"{remote}/{name} cannot be written: {error.strerror}.") from None


def check_place(remote: str, fingerprint: str) -> None:
    """Raises UserError where `remote` is out of reach, or holds tokens with another fingerprint: they would be lost."""
    try:
        there = json.loads(read(f"{remote}/{artifact.MANIFEST}"))["fingerprint"]
    except FileNotFoundError:
        next(objects(f"{remote}/"), None)  # says so where there is no such bucket
        return
    except PermissionError as error:
        raise UserError(f"tokens.upload: {remote} cannot be used: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        there = None
    if there != fingerprint:
        raise UserError(
            f"tokens.upload: {remote} holds something else already (fingerprint {there}): name another place, or empty "
            "that one."
        )


def _without_empty_arrays(record: Record) -> Record:
    """MDS has no empty arrays: where there are no captions, one row of zeros stands for none."""
    text = record["text_conditioning"]
    return record if len(text) else {**record, "text_conditioning": np.zeros((1, text.shape[1]), text.dtype)}
