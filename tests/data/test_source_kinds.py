"""Manifests, MDS and WebDataset tars, here and in a bucket that moto's server plays."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from buckets import BUCKET, each_cloud, put
from streaming import MDSWriter

from data import cloud, storage
from data.config import DataConfig
from data.corpus import Clip, load_clip, read_clips, read_jsonl
from data.indexing import index_audio
from data.progress import Progress
from data.sources import open_source, sources_fingerprint
from model.errors import UserError

RATE = 16_000


def wave(name: str, seconds: float = 2.0) -> np.ndarray:
    """Noise that is the same for a name."""
    random = np.random.default_rng([*name.encode()])
    return (0.2 * random.normal(size=round(seconds * RATE))).clip(-0.9, 0.9).astype(np.float32)


def encoded(name: str, kind: str = "WAV", seconds: float = 2.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave(name, seconds), RATE, format=kind, subtype="PCM_16")
    return file.getvalue()


def index(folder: Path, audio: Any, seed: int = 0, **config: Any) -> tuple[list[Clip], list[dict], dict[str, Any]]:
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    settings = DataConfig(audio=str(audio), **{"clip_seconds": 1.0, "validation": 0.3, **config})
    info = index_audio(corpus, settings, seed, Progress())
    return read_clips(corpus, short=True), read_jsonl(corpus / "skipped.jsonl"), info


def check_waves(corpus: Path, clips: list[Clip], names: list[str]) -> None:
    """Each clip gives the second of `names[its file]` that it says."""
    for clip, name in zip(clips, names, strict=True):
        first = round(clip.start * RATE)
        expected = wave(name, 10.0)[first : first + RATE]
        np.testing.assert_allclose(load_clip(corpus, clip, RATE), expected, atol=1e-4)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_mds(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    columns = {"audio": "bytes", "id": "str", "caption": "str", "bpm": "int", "score": "float32", "tags": "json"}
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return folder


def mds_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"audio": encoded(f"m{n}", "FLAC"), "id": f"id {n}", "caption": f"song {n}", "bpm": 60 + n, "score": 0.5 * n,
         "tags": ["calm"]}
        for n in range(count)
    ]  # fmt: skip


def test_a_manifest_has_times_splits_tags_and_columns(tmp_path: Path) -> None:
    music = tmp_path / "music"
    music.mkdir()
    (music / "a.wav").write_bytes(encoded("a", seconds=10.0))
    (tmp_path / "b.flac").write_bytes(encoded("b", "FLAC"))
    rows = [
        {"path": "music/a.wav", "start": 2.5, "end": 5.5, "caption": "one", "artist": "X", "bpm": 90, "split": "train"},
        {"path": "music/a.wav", "start": 7, "captions": ["two", "three"], "artist": "X", "live": True, "split": "test"},
        {"path": str(tmp_path / "b.flac"), "split": "valid", "tags": ["rock", "guitar"], "id": "my id", "notes": [1]},
    ]
    clips, skipped, info = index(tmp_path, write_manifest(tmp_path / "songs.jsonl", rows))
    assert skipped == []
    assert [(Path(clip.path).name, clip.start, clip.split) for clip in clips] == [
        ("a.wav", 2.5, "train"), ("a.wav", 3.5, "train"), ("a.wav", 4.5, "train"), ("a.wav", 7.0, "test"),
        ("a.wav", 8.0, "test"), ("a.wav", 9.0, "test"), ("b.flac", 0.0, "validation"), ("b.flac", 1.0, "validation"),
    ]  # fmt: skip
    assert clips[0].captions == ("one",)
    assert clips[3].captions == ("two", "three")
    assert clips[0].columns == {"artist": "X", "bpm": 90}
    assert clips[3].columns == {"artist": "X", "live": True}
    assert clips[6].columns == {"id": "my id", "notes": "[1]"}
    assert info["columns"] == ["artist", "bpm", "id", "live", "notes"]
    # What has no captions gets some of its tags.
    assert len(clips[6].captions) == 3
    assert all("rock" in text or "guitar" in text for text in clips[6].captions)
    assert len({clip.id for clip in clips}) == len(clips)
    check_waves(tmp_path, clips, ["a"] * 6 + ["b"] * 2)


@pytest.mark.parametrize(("name", "separator"), [("songs.csv", ","), ("songs.csv", ";"), ("songs.tsv", "\t")])
def test_a_table_makes_numbers_of_columns_of_numbers(tmp_path: Path, name: str, separator: str) -> None:
    for song in "ab":
        (tmp_path / f"{song}.wav").write_bytes(encoded(song, seconds=3.0))
    lines = ["Path,Caption,start,end,bpm,score,band", "a.wav,x,,2,90,1,1975", "b.wav,y,1.0,,120,2.5,Queen"]
    (tmp_path / name).write_text("\r\n".join(lines).replace(",", separator), encoding="utf-8-sig")
    clips, skipped, _ = index(tmp_path, tmp_path / name)
    assert skipped == []
    assert [clip.start for clip in clips] == [0, 1, 1, 2]
    assert clips[0].columns == {"bpm": 90, "score": 1.0, "band": "1975"}
    assert clips[2].columns == {"bpm": 120, "score": 2.5, "band": "Queen"}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_mds_of_raw_audio(tmp_path: Path, compression: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # another process would take long to import streaming
    folder = write_mds(tmp_path / "mds", mds_rows(6), compression=compression, size_limit=100_000, hashes=["sha1"])
    assert len(list(folder.glob("shard*"))) > 1
    clips, skipped, info = index(tmp_path, folder)
    assert skipped == []
    assert info["files"] == 6
    assert clips[2].captions == ("song 1",)
    assert clips[2].columns == {"id": "id 1", "bpm": 61, "score": 0.5}
    check_waves(tmp_path, clips, [f"m{n}" for n in range(6) for _ in range(2)])
    assert sources_fingerprint(DataConfig(audio=str(folder))) == sources_fingerprint(DataConfig(audio=str(folder)))


def test_mds_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    with MDSWriter(out=str(tmp_path / "mds"), columns={"audio": "bytes", "extra": "pkl"}) as writer:
        for number in range(3):
            writer.write({"audio": encoded(f"m{number}"), "extra": Bomb()})
    clips, _, info = index(tmp_path, tmp_path / "mds")
    assert len(clips) == 6
    assert info["columns"] == []
    assert not (tmp_path / "ran").exists()


def tar_members(numbers: range) -> dict[str, bytes]:
    members = {}
    for number in numbers:
        members[f"{number:04}.flac"] = encoded(f"t{number}", "FLAC")
        if number % 2:
            members[f"{number:04}.json"] = json.dumps({"caption": f"song {number}", "bpm": number}).encode()
        else:
            members[f"{number:04}.txt"] = f"song {number}\nagain {number}\n".encode()
    return members


@pytest.mark.parametrize("form", ["one", "folder", "braces"])
def test_webdataset_tars(tmp_path: Path, form: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        write_tar(shards / f"s-{number:03}.tar", tar_members(range(4 * number, 4 * number + 4)))
    audio = {"one": shards / "s-000.tar", "folder": shards, "braces": shards / "s-{000..002}.tar"}[form]
    clips, skipped, info = index(tmp_path, audio)
    count = 4 if form == "one" else 12
    assert skipped == []
    assert info["files"] == count
    assert clips[0].captions == ("song 0", "again 0")
    assert clips[2].columns == {"bpm": 1}
    check_waves(tmp_path, clips, [f"t{n}" for n in range(count) for _ in range(2)])


def test_tars_of_the_webdataset_package_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"a/{number}", "wav": encoded(f"w{number}"), "json": {"artist": f"A{number}"}})
    clips, _, _ = index(tmp_path, tmp_path / "x.tar", split_by="artist")
    assert [clip.columns["artist"] for clip in clips] == ["A0", "A0", "A1", "A1", "A2", "A2"]
    check_waves(tmp_path, clips, ["w0", "w0", "w1", "w1", "w2", "w2"])


@each_cloud
@pytest.mark.parametrize("kind", ["folder", "manifest", "tar", "tars", "mds"])
def test_sources_in_a_bucket(bucket: str, tmp_path: Path, kind: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    if kind == "mds":
        write_mds(here, mds_rows(4), compression="zstd")
    elif kind in ("tar", "tars"):
        write_tar(here / "s-0.tar", {f"m{n}.wav": encoded(f"m{n}") for n in range(2)})
        write_tar(here / "s-1.tar", {f"m{n}.wav": encoded(f"m{n}") for n in range(2, 4)})
    else:
        for number in range(4):
            (here / f"m{number}.wav").write_bytes(encoded(f"m{number}"))
            (here / f"m{number}.txt").write_text(f"song {number}")
        (here / ".hidden.wav").write_bytes(encoded("hidden"))
        write_manifest(
            here / "songs.jsonl", [{"path": f"./m{number}.wav", "caption": f"song {number}"} for number in range(4)]
        )
        if kind == "folder":
            (here / "songs.jsonl").unlink()
    put(here, f"{bucket}/music")
    address = f"{bucket}/music/"
    audio = {"manifest": address + "songs.jsonl", "tar": address + "s-1.tar", "tars": address + "s-{0..1}.tar"}
    source = audio.get(kind, address)
    clips, skipped, info = index(tmp_path, source)
    assert skipped == []
    names = [f"m{n}" for n in range(2 if kind == "tar" else 0, 4)]
    assert info["files"] == len(names)
    assert all(BUCKET in clip.path for clip in clips)
    if kind in ("folder", "manifest"):
        assert [clip.captions for clip in clips] == [(f"song {n}",) for n in range(4) for _ in range(2)]
    check_waves(tmp_path, clips, [name for name in names for _ in range(2)])
    # Another process starts without copies.
    storage._COPIES.forget()
    check_waves(tmp_path, clips[:1], names[:1])

    before = sources_fingerprint(DataConfig(audio=source))
    assert before == sources_fingerprint(DataConfig(audio=source))
    name = "shard.00000.mds.zstd" if kind == "mds" else "s-1.tar" if "tar" in kind else "m1.wav"
    (here / "other").write_bytes(encoded("other"))
    cloud.store(here / "other", address + name)
    assert before != sources_fingerprint(DataConfig(audio=source))


def test_a_manifest_here_may_name_objects(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="a b/1.wav", Body=encoded("a"))
    (tmp_path / "2.wav").write_bytes(encoded("b"))
    rows = [{"path": f"s3://{BUCKET}/a b/1.wav"}, {"path": "2.wav"}, {"path": f"s3://{BUCKET}/gone.wav"}]
    clips, skipped, _ = index(tmp_path, write_manifest(tmp_path / "songs.jsonl", rows))
    check_waves(tmp_path, clips, ["a", "a", "b", "b"])
    assert [(row["file"], row["reason"]) for row in skipped] == [(f"s3://{BUCKET}/gone.wav", "missing")]


def test_a_bucket_out_of_reach_is_one_plain_line(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no bucket nowhere\. Check its name"):
        sources_fingerprint(DataConfig(audio="s3://nowhere/music"))
    with pytest.raises(UserError, match="holds no objects"):
        sources_fingerprint(DataConfig(audio=f"s3://{BUCKET}/music"))
    with pytest.raises(UserError, match=r"songs\.jsonl cannot be read: no such object"):
        sources_fingerprint(DataConfig(audio=f"s3://{BUCKET}/songs.jsonl"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"Unable to locate credentials.* Check the AWS credentials"):
        sources_fingerprint(DataConfig(audio=f"s3://{BUCKET}/music"))


def test_copies_are_bounded_and_safe_to_share(tmp_path: Path) -> None:
    copies = storage._Copies(limit=10)
    made = []

    def content(name: str) -> bytes:
        def fill(file: Any) -> None:
            made.append(name)
            file.write(name.encode() * 6)

        with storage._Stretch(copies.opened(name, fill), 0, None) as file:
            return file.readall()

    assert content("a") == content("a") == b"aaaaaa"
    held = storage._Stretch(copies.opened("a", lambda file: None), 0, None)
    assert content("b") == b"bbbbbb"
    assert "a" not in copies
    assert held.readall() == b"aaaaaa"  # its reader still has it
    assert made == ["a", "b"]


def test_threads_that_want_one_copy_make_it_once() -> None:
    copies, made = storage._Copies(limit=1000), []

    def fill(file: Any) -> None:
        made.append(1)
        time.sleep(0.05)
        file.write(b"0123456789")

    def read(number: int) -> bytes:
        with storage._Stretch(copies.opened("a", fill), number, 3) as file:
            return file.readall()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(7))) == [b"0123456789"[number : number + 3] for number in range(7)]
    assert made == [1]


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (["a.wav", "x.tar"], "FolderSource"),
        (["x.tar", "readme.txt"], "WebDatasetSource"),
        (["a.wav", "index.json"], "FolderSource"),
        (["a {1}.wav"], "FolderSource"),
    ],
)
def test_what_a_folder_is_shows_in_what_it_holds(tmp_path: Path, found: list[str], kind: str) -> None:
    folder = tmp_path / "songs {live}.tar"
    folder.mkdir()
    for name in found:
        (folder / name).write_bytes(b"")
    assert type(open_source(DataConfig(audio=str(folder)))).__name__ == kind
    with pytest.raises(UserError, match=r"index\.json cannot be read|is not the index"):
        open_source(DataConfig(audio=str(folder), format="mds"))


def test_captions_of_a_folder_do_not_go_with_a_manifest(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "songs.jsonl", [{"path": "a.wav"}])
    with pytest.raises(UserError, match=r"data\.captions goes with a folder"):
        open_source(DataConfig(audio=str(manifest), captions="x.csv"))


def test_clip_ids_do_not_change_when_a_corpus_grows_or_moves(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, "bd"), (second, "abcd")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.wav").write_bytes(encoded(name))
    before = {clip.id for clip in index(tmp_path, first)[0]}
    after = {clip.id: Path(clip.path).name for clip in index(tmp_path, second)[0]}
    assert len(before) == 4
    assert before == {name for name, file in after.items() if file in ("b.wav", "d.wav")}
