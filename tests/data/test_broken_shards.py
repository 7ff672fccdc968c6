"""Every kind of broken tar and MDS shards beside good ones: what is good in them is used, and the rest named, or all is
refused in one line."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_audio import cut, encoded, index
from streaming import MDSWriter

from model.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


THREE = [(f"{number}.wav", encoded(number + 10)) for number in range(3)]
WHOLE = tar_of(THREE)
# A tar beside a good one, its fate, and how many of its samples are used.
TARS: dict[str, tuple[bytes, str, int]] = {
    "cut off in a member": (cut(WHOLE, 0.5), "damaged", 1),
    "a damaged header": (WHOLE[: len(WHOLE) // 2] + b"\xff" * 200_000, "damaged", 1),
    "no tar": (b"not a tar at all" * 1000, "damaged", 0),
    "no bytes": (b"", "damaged", 0),
    "a sample without audio": (tar_of([*THREE, ("9.json", b"{}")]), "no audio", 3),
    "JSON that is none": (tar_of([*THREE[:2], ("9.json", b"{"), ("9.wav", encoded(9))]), "malformed row", 2),
    "JSON that is a list": (tar_of([*THREE[:2], ("9.json", b"[]"), ("9.wav", encoded(9))]), "malformed row", 2),
    "words not UTF-8": (tar_of([*THREE[:2], ("9.txt", b"\xff\xfe\xe9"), ("9.wav", encoded(9))]), "malformed row", 2),
    "one name twice": (tar_of([*THREE, THREE[0]]), "duplicate row", 3),
    "a damaged sound": (tar_of([*THREE[:2], ("9.wav", b"RIFF" + bytes(500))]), "unreadable", 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_a_broken_tar(tmp_path: Path, kind: str) -> None:
    content, fate, used = TARS[kind]
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a good.tar").write_bytes(tar_of([(f"{n}.wav", encoded(n + 1000)) for n in range(2)]))
    (shards / "b broken.tar").write_bytes(content)
    clips, skipped, _ = index(tmp_path, shards)
    assert sum("a good.tar" in clip.path for clip in clips) == 6
    assert fate in {row["reason"] for row in skipped}
    assert all(row["file"].startswith("b broken.tar") for row in skipped)
    # The member that the cut goes through gives what is left of it.
    assert sum("b broken.tar" in clip.path for clip in clips) // 3 == used


def test_a_tar_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "s-0.tar").write_bytes(WHOLE)
    clips, skipped, _ = index(tmp_path, tmp_path / "s-{0..1}.tar")
    assert len(clips) == 9
    assert [(row["file"], row["reason"]) for row in skipped] == [("s-1.tar", "missing")]


def written(folder: Path, splits: tuple[str, ...] = ("", "", ""), **options: Any) -> list[Path]:
    """Three shards of one record each."""
    columns = {"audio": "bytes", "split": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=110_000, **options) as writer:
        for number, split in enumerate(splits):
            writer.write({"audio": encoded(number + 10), "split": split})
    return sorted(folder.glob("shard*"))


def test_a_record_with_a_bad_value(tmp_path: Path) -> None:
    written(tmp_path / "mds", ("train", "tain", "validation"))
    clips, skipped, _ = index(tmp_path, tmp_path / "mds")
    assert len(clips) == 6
    assert [(row["file"], row["reason"]) for row in skipped] == [("shard.00001.mds/0", "malformed row")]


MDS: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
    "no bytes": lambda shard: shard.write_bytes(b""),
    "gone": lambda shard: shard.unlink(),
    "zeros at its head": lambda shard: shard.write_bytes(bytes(64) + shard.read_bytes()[64:]),
    "noise at its head": lambda shard: shard.write_bytes(
        shard.read_bytes()[:4] + b"\xff" * 60 + shard.read_bytes()[64:]
    ),
}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", MDS)
def test_a_broken_shard(tmp_path: Path, kind: str, compression: str | None) -> None:
    first, *_ = written(tmp_path / "mds", compression=compression)
    MDS[kind](first)
    clips, skipped, _ = index(tmp_path, tmp_path / "mds")
    assert len(clips) == 6
    assert {row["file"].partition("/")[0] for row in skipped} == {first.name}
    assert {row["reason"] for row in skipped} <= {"damaged", "missing", "unreadable"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not the index of MDS shards"),
        (b"[]", "is not the index of MDS shards"),
        (b'{"shards": [{"format": "csv"}]}', "a shard has format csv"),
        (b'{"shards": [{}]}', "is not the index of MDS shards"),
    ],
)
def test_an_index_of_no_use_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    written(tmp_path / "mds")
    (tmp_path / "mds" / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        index(tmp_path, tmp_path / "mds")
    assert "\n" not in str(error.value)


def test_shards_without_audio_are_refused_in_one_line(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "mds"), columns={"codes": "bytes"}) as writer:
        writer.write({"codes": b"x"})
    with pytest.raises(UserError, match="has no column of bytes called audio"):
        index(tmp_path, tmp_path / "mds")
