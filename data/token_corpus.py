"""Token artifacts as training reads them: where their shards lie, and whether those of several corpora go together.

Imports neither torch nor mosaicml-streaming.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import cloud
from model import artifact
from model.errors import UserError
from model.fields import CONDITIONING

KIND = "tokens"
TRAIN, VALIDATION = "train", "validation"
INDEX = "index.json"
COLUMNS_FILE = "columns.json"
HASH = "xxh64"
"""What shards that are fetched are checked by."""
INPUTS = ("codec", "embedding", "quantizers")
"""What tokens must have been made by alike to be mixed."""


@dataclass(frozen=True)
class TokenCorpus:
    """A token artifact whose manifest, indexes and columns are in `folder`."""

    folder: Path
    address: str
    """What the user calls it."""
    manifest: Mapping[str, Any]
    remote: str | None = None
    """`s3://bucket/prefix` of its shards where they are not in `folder`."""

    @classmethod
    def read(cls, folder: Path, address: str | None = None) -> TokenCorpus:
        """Raises UserError where `folder` holds no token artifact. `address`: the bucket that it was copied from."""
        manifest = artifact.read(folder, KIND).manifest
        remote = (address or manifest["info"].get("remote") or "").rstrip("/")
        return cls(folder, address or str(folder), manifest, remote or None)

    @property
    def info(self) -> dict[str, Any]:
        return self.manifest["info"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def index(self, split: str) -> list[dict[str, Any]]:
        """The entries of a split's shards. Raises UserError where its index is missing or damaged."""
        path = self.folder / split / INDEX
        try:
            return json.loads(path.read_text())["shards"]
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {self.address} has no {split} shards.") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: it does not read as the index of a shard folder.") from None

    def columns(self, split: str) -> dict[str, list[Any]]:
        """Column of the manifest → its value for each record. Raises UserError where there are none."""
        path = self.folder / split / COLUMNS_FILE
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"train.filter: {self.address} has no {split}/{COLUMNS_FILE}, so nothing to filter by. "
                f"Make its tokens anew."
            ) from None

    def damage(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        """What is wrong with the files that are in `folder`, in words that name them: with the i-th of n parts of them,
        of `share` = (i, n). Each file is digested; shards that are fetched are checked then."""
        files = self.manifest["files"]
        if self.remote is not None:
            files = {name: file for name, file in files.items() if (self.folder / name).exists()}
        return artifact.problems(artifact.Artifact(self.folder, {**self.manifest, "files": files}), share=share)

    def place(self, split: str) -> str:
        """Where the shard files are: a folder or an address in a bucket."""
        return f"{self.remote}/{split}" if self.remote else str(self.folder / split)

    def cached(self, split: str) -> bool:
        """Whether its shards are read from a cache: because they are in a bucket, or compressed."""
        return self.remote is not None or any(entry["zip_data"] for entry in self.index(split))


def shard_sizes(index: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    """Records of each shard of an index."""
    return np.array([entry["samples"] for entry in index], np.int64)


def shard_file(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a shard as it is stored: `{"basename": …, "bytes": …, "hashes": …}`."""
    return entry["zip_data"] or entry["raw_data"]


def stored_bytes(address: str) -> bytes:
    """The contents of a shard file as it is stored, here or in a bucket. Raises OSError, and UserError as
    `cloud.fetch` does."""
    return cloud.read(address) if cloud.is_remote(address) else Path(address).read_bytes()


def artifact_manifest(address: str) -> tuple[str, dict[str, Any]]:
    """The token artifact that `address` names, a tokens folder, a run folder that has one, or an address in cloud
    storage of one, and its manifest. Raises UserError where there is none."""
    if not cloud.is_remote(address):
        folder = Path(address)
        folder = folder if (folder / artifact.MANIFEST).exists() or not (folder / KIND).exists() else folder / KIND
        try:
            return str(folder), artifact.read(folder, KIND).manifest
        except UserError as error:
            raise UserError(f"train.mix: {error}") from None
    address = address.rstrip("/")
    try:
        content = cloud.read(f"{address}/{artifact.MANIFEST}")
    except FileNotFoundError:
        raise UserError(f"train.mix: {address} holds no token artifact: it has no {artifact.MANIFEST}.") from None
    try:
        return address, artifact.parse(content, address, KIND)
    except UserError as error:
        raise UserError(f"train.mix: {error}") from None


def copy_metadata(address: str, folder: Path) -> None:
    """Fetches from a bucket what says what an artifact's training shards hold: manifest, index and columns."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / TRAIN).mkdir(parents=True)
    for name in (f"{TRAIN}/{INDEX}", f"{TRAIN}/{COLUMNS_FILE}", artifact.MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).write_bytes(cloud.read(f"{address}/{name}"))


def disagreements(own: Mapping[str, Any], other: Mapping[str, Any], where: str) -> Iterator[str]:
    """What keeps tokens with these manifests from being mixed, in words that begin with `where`.

    Encoders are compared where both manifests name them.
    """
    if own["fingerprint"] == other["fingerprint"]:
        yield f"{where}: they are the same tokens."
    infos = own["info"], other["info"]
    for name in sorted({name for info in infos for name in info["fields"]}):
        fields = [info["fields"].get(name) or {} for info in infos]
        for part in ("rate_hz", "quantizers", "codebook_size"):
            first, second = (field.get(part) for field in fields)
            if first != second:
                yield f"{where}: {part} of {name} is {first} in the first and {second} in the other."
    for part in ("hop_seconds", "embedding_seconds"):
        first, second = (info[part] for info in infos)
        if first != second:
            yield f"{where}: {part} is {first:g} in the first and {second:g} in the other."
    for part in INPUTS:
        first, second = (manifest["inputs"].get(part) for manifest in (own, other))
        if first != second:
            yield f"{where}: the {part} that made them differs (fingerprints {first} and {second})."
    first, second = (info.get("encoders", {}).get("semantic") for info in infos)
    if first != second and None not in (first, second):
        yield f"{where}: the semantic encoder that made them differs (fingerprints {first} and {second})."


def index_problems(corpus: TokenCorpus, split: str) -> Iterator[str]:
    """Where the index of a split does not match its shards, its columns or its manifest, in words."""
    index, where = corpus.index(split), corpus.folder / split
    count = int(shard_sizes(index).sum())
    expected = corpus.info.get("records", {}).get(split, count)
    if count != expected:
        yield f"{where / INDEX} counts {count} records, the manifest beside it {expected}"
    if (where / COLUMNS_FILE).exists():
        for name, values in corpus.columns(split).items():
            if len(values) != count:
                yield f"{where / COLUMNS_FILE} has {len(values)} values of {name!r} for {count} records"
    needed = {"id", "captions", "text_conditioning", CONDITIONING, *corpus.info["fields"]}
    for entry in index:
        if missing := needed - set(entry["column_names"]):
            yield f"{_stored(corpus, split, entry)} has no column {', '.join(sorted(missing))}"
    yield from _remote_problems(corpus, split, index) if corpus.remote else _local_problems(corpus, split, index)


def _stored(corpus: TokenCorpus, split: str, entry: Mapping[str, Any]) -> str:
    return f"{corpus.place(split)}/{shard_file(entry)['basename']}"


def _remote_problems(corpus: TokenCorpus, split: str, index: list[dict[str, Any]]) -> Iterator[str]:
    place = corpus.place(split)
    there = {url.removeprefix(f"{place}/"): size for url, size, _ in cloud.objects(f"{place}/")}
    for entry in index:
        file, name = shard_file(entry), _stored(corpus, split, entry)
        if HASH not in file["hashes"]:
            yield f"{name} was written without {HASH}, by which it would be checked when it is fetched"
        yield from _size_problem(name, there.get(file["basename"]), file["bytes"])


def _local_problems(corpus: TokenCorpus, split: str, index: list[dict[str, Any]]) -> Iterator[str]:
    for entry in index:
        file, name = shard_file(entry), _stored(corpus, split, entry)
        path = Path(name)
        wrong = list(_size_problem(name, path.stat().st_size if path.is_file() else None, file["bytes"]))
        if not wrong and not entry["zip_data"]:
            with path.open("rb") as shard:  # an MDS file begins with the number of its records
                found = int.from_bytes(shard.read(4), "little")
            if found != entry["samples"]:
                wrong.append(f"{name} holds {found} records, its index says {entry['samples']}")
        yield from wrong


def _size_problem(name: str, found: int | None, expected: int) -> Iterator[str]:
    if found is None:
        yield f"{name} is missing"
    elif found != expected:
        yield f"{name} has {found} bytes, its index says {expected}"
