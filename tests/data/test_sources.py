from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data.config import DataConfig
from data.corpus import load_clip, read_clips, read_jsonl, read_prompts
from data.indexing import index_audio
from data.progress import Progress
from data.sources import sources_fingerprint
from model.errors import UserError


def music(path: Path, seconds: float = 2.0, rate: int = 16_000, channels: int = 1, subtype: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([*path.name.encode(errors="surrogateescape")])
    wave = 0.3 * np.sin(np.arange(round(seconds * rate)) * 0.1) + 0.02 * random.normal(size=round(seconds * rate))
    soundfile.write(path, np.stack([wave] * channels, 1), rate, subtype=subtype)
    return path


class Indexed:
    def __init__(self, corpus: Path, info: dict[str, Any], audio: Path) -> None:
        self.corpus, self.info, self.audio = corpus, info, audio
        self.clips = read_clips(corpus, short=True)
        self.rows = read_jsonl(corpus / "skipped.jsonl")
        self.skipped = {row["file"]: row for row in self.rows}

    def captions(self) -> dict[str, tuple[str, ...]]:
        return {Path(clip.path).relative_to(self.audio).as_posix(): clip.captions for clip in self.clips}


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    (tmp_path / "music").mkdir()
    return (tmp_path / "music").resolve()


def index(audio: Path, seed: int = 0, **config: Any) -> Indexed:
    corpus = audio.parent / f"corpus-{seed}"
    corpus.mkdir(exist_ok=True)
    settings = DataConfig(audio=str(audio), **{"clip_seconds": 1.0, "validation": 0.2, **config})
    return Indexed(corpus, index_audio(corpus, settings, seed, Progress()), audio)


def test_mixed_folder(audio: Path) -> None:
    music(audio / "a.wav", 3.5, 44_100, 2)
    music(audio / "b.flac", 2.0, 22_050, 1)
    music(audio / "deep" / "er" / "c.ogg", 2.0, 48_000, 2)
    music(audio / "deep" / "d.mp3", 2.0, 44_100, 1)
    music(audio / "almost.wav", 0.95)
    music(audio / "named wrongly.flac", 1.0).rename(audio / "named wrongly.dat")
    music(audio / ".hidden.wav")
    music(audio / ".trash" / "x.wav")
    music(audio / "run" / "samples" / "generated.wav")
    (audio / "run" / "recipe.yaml").write_text("name: quickstart")
    (audio / "cover.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(3000))
    (audio / "readme.txt").write_text("not a caption")
    # What cannot be used.
    (audio / "empty.wav").write_bytes(b"")
    (audio / "noise.mp3").write_bytes(b"this is text" * 100)
    music(audio / "short.wav", 0.5)
    soundfile.write(audio / "silent.wav", np.zeros(32_000), 16_000)
    soundfile.write(audio / "nan.wav", np.full(32_000, np.nan), 16_000, subtype="FLOAT")
    cut = music(audio / "cut.wav", 4.0)
    cut.write_bytes(cut.read_bytes()[:80_000])
    os.mkfifo(audio / "pipe.wav")
    (audio / "gone.wav").symlink_to(audio / "nowhere.wav")
    (audio / "deep" / "loop").symlink_to(audio)
    (audio / "twice.wav").symlink_to(audio / "a.wav")

    found = index(audio)
    used = [(Path(clip.path).relative_to(audio).as_posix(), clip.start) for clip in found.clips]
    assert used == [
        ("a.wav", 0), ("a.wav", 1), ("a.wav", 2), ("almost.wav", 0), ("b.flac", 0), ("b.flac", 1), ("cut.wav", 0),
        ("cut.wav", 1), ("deep/d.mp3", 0), ("deep/d.mp3", 1), ("deep/er/c.ogg", 0), ("deep/er/c.ogg", 1),
        ("named wrongly.dat", 0),
    ]  # fmt: skip
    assert {name: row["reason"] for name, row in found.skipped.items()} == {
        "empty.wav": "empty", "noise.mp3": "unreadable", "short.wav": "too short", "silent.wav": "silent",
        "nan.wav": "invalid samples", "cut.wav": "truncated",
    }  # fmt: skip
    assert found.skipped["cut.wav"]["clips"] == 2
    assert found.info["skipped"] == 6
    assert found.info["skipped_reasons"]["truncated"] == 1
    assert found.info["clips"] == 13
    assert found.info["files"] == 7
    assert found.info["captions"] is False
    assert read_prompts(found.corpus) == []
    for clip in found.clips:
        wave = load_clip(found.corpus, clip, 24_000)
        assert wave.shape == (24_000,)
        assert wave.std() > 0.1
    files_of = {split: {clip.path for clip in found.clips if clip.split == split} for split in ("train", "validation")}
    assert files_of["train"]
    assert files_of["validation"]
    assert not files_of["train"] & files_of["validation"]


def test_clips_of_their_own_length(audio: Path) -> None:
    for name, seconds in (("a", 5.0), ("b", 8.2), ("c", 3.2), ("d", 1.1), ("e", 0.9), ("f", 4.8)):
        music(audio / f"{name}.wav", seconds, 44_100)
    found = index(audio, clip_seconds=5.0, shortest_seconds=1.0)
    clips = [(Path(clip.path).stem, clip.start, clip.seconds) for clip in found.clips]
    assert clips == [("a", 0, 5.0), ("b", 0, 5.0), ("b", 5.0, 3.2), ("c", 0, 3.2), ("d", 0, 1.1), ("f", 0, 4.8)]
    assert found.skipped["e.wav"]["reason"] == "too short"
    assert found.skipped["e.wav"]["detail"] == "it lasts 0.90 s; a clip needs 1 s"
    for clip in found.clips:
        wave = load_clip(found.corpus, clip, 16_000)
        assert wave.shape == (round(16_000 * clip.seconds),)
        assert np.abs(wave[-100:]).max() > 0.01  # no silence at its end
    # What is fitted on batches of audio takes clips of one length, of which either split has some.
    for split in ("train", "validation"):
        assert {clip.seconds for clip in read_clips(found.corpus, split)} == {5.0}
    assert found.info["clips"] == 6
    assert found.info["seconds"] == pytest.approx(22.3)


def test_clips_of_a_length_that_is_no_whole_number_of_samples_are_all_whole(audio: Path) -> None:
    music(audio / "a.wav", 10.0, 11_025)
    found = index(audio, clip_seconds=2.5, shortest_seconds=2.5)
    assert [clip.seconds for clip in found.clips] == [2.5] * 4


def test_short_clips_leave_each_split_a_whole_one(audio: Path) -> None:
    music(audio / "long.wav", 10.5, 8000)
    for number in range(6):
        music(audio / f"{number}.wav", 0.7, 8000)
    for seed in range(3):
        found = index(audio, seed, shortest_seconds=0.5)
        assert found.info["clips"] == 17
        assert len(read_clips(found.corpus, "train")) + len(read_clips(found.corpus, "validation")) == 10
        assert read_clips(found.corpus, "train")
        assert read_clips(found.corpus, "validation")
    with pytest.raises(UserError, match=r"gives no clip of 20 s.* lower data\.clip_seconds"):
        index(audio, clip_seconds=20.0, shortest_seconds=0.5)


def test_many_files_are_read_by_several_processes_with_the_same_result(audio: Path) -> None:
    for number in range(70):
        music(audio / f"{number:02}.wav", 1.0, 8000)
    (audio / "69.wav").write_bytes(b"")
    found = index(audio)
    assert [Path(clip.path).name for clip in found.clips] == [f"{number:02}.wav" for number in range(69)]
    assert found.info["clips"] == 69
    assert found.info["splits"]["validation"] in range(6, 24)


def test_split_follows_the_seed(audio: Path) -> None:
    for number in range(12):
        music(audio / f"{number}.wav", 1.0, 8000)

    def validation(seed: int) -> set[str]:
        return {Path(clip.path).name for clip in index(audio, seed).clips if clip.split == "validation"}

    assert validation(0)
    assert validation(0) == validation(0)
    assert len({frozenset(validation(seed)) for seed in range(4)}) > 1


def test_one_long_file_does_not_take_the_training_away(audio: Path) -> None:
    music(audio / "long.wav", 30.0, 8000)
    music(audio / "short.wav", 1.0, 8000)
    for seed in range(4):
        assert index(audio, seed, validation=0.001).info["splits"] == {"train": 30, "validation": 1}


def test_a_single_file_is_split_by_clip(audio: Path) -> None:
    music(audio / "only.wav", 10.0, 8000)
    assert [clip.split for clip in index(audio).clips] == ["train"] * 8 + ["validation"] * 2
    music(audio / "only.wav", 2.0, 8000)
    assert [clip.split for clip in index(audio).clips] == ["train", "validation"]


@pytest.mark.parametrize("form", ["jsonl", "csv", "named csv", "found csv", "txt"])
def test_caption_forms(audio: Path, form: str) -> None:
    for name in ("a.wav", "b.flac", "sub/c.ogg", "d.wav"):
        music(audio / name)
    if form == "jsonl":
        rows = [
            {"file": "a.wav", "caption": "a slow flute"},
            {"path": "./b.flac", "captions": ["one", "two", "one"]},
            {"audio": str(audio / "sub" / "c.ogg"), "text": " bells  ring "},
            {"file_name": "missing.wav", "caption": "x"},
            {"file": "d.wav", "caption": ""},
        ]
        (audio / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
        config = {}
    elif form == "txt":
        (audio / "a.txt").write_text("a slow flute\n")
        (audio / "b.txt").write_text("one\n\ntwo\n")
        (audio / "sub" / "c.txt").write_text("bells ring")
        (audio / "d.txt").write_bytes(b"caf\xe9")
        config = {}
    else:
        separator = ";" if form == "found csv" else ","
        rows = ["File,Title,Caption", 'a.wav,x,"a slow flute"', "b.flac,x,one", "b.flac,x,two", "c.ogg,x,bells ring"]
        text = "\r\n".join([*rows, "missing.wav,x,gone"]).replace(",", separator)
        path = {"csv": audio / "captions.csv", "found csv": audio / "my words.csv"}.get(
            form, audio.parent / "words.csv"
        )
        path.write_text(text)
        config = {"captions": str(path)} if form == "named csv" else {}
    found = index(audio, **config)
    assert found.captions() == {
        "a.wav": ("a slow flute",), "b.flac": ("one", "two"), "sub/c.ogg": ("bells ring",), "d.wav": (),
    }  # fmt: skip
    assert found.info["captions"] is True
    prompts = {prompt.prompt for prompt in read_prompts(found.corpus)}
    spoken = {clip.captions[0] for clip in found.clips if clip.split == "validation" and clip.captions}
    assert prompts == spoken or (not spoken and prompts)
    if form == "txt":
        assert found.skipped["d.wav"]["reason"] == "captions not readable"
        assert found.skipped["d.wav"]["clips"] == 2
    else:
        assert found.skipped["missing.wav"]["reason"] == "caption names a missing file"
        assert found.info["skipped_reasons"] == {"caption names a missing file": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.jsonl", '{"file": "a.wav", "caption": "x"}\n{"file": ', "line 2: not JSON"),
        ("captions.jsonl", '["a.wav", "x"]', "line 1: not an object"),
        ("captions.jsonl", '{"file": "a.wav"}', "line 1: the row has no caption or"),
        ("captions.jsonl", '{"file": "a.wav", "caption": 3}', "line 1: caption must be text"),
        ("captions.csv", 'file,caption\na.wav,"x" y"\n', "line 2: not a CSV row"),
        ("captions.jsonl", b'{"file": "a.wav", "caption": "caf\xe9"}', "line 1: caption is not UTF-8 text"),
    ],
)
def test_a_malformed_row_of_captions_is_reported_and_the_rest_used(
    audio: Path, name: str, text: str | bytes, message: str
) -> None:
    music(audio / "a.wav")
    music(audio / "b.wav")
    good = b"b.wav,good\n" if name.endswith(".csv") else b'\n{"file": "b.wav", "caption": "good"}\n'
    (audio / name).write_bytes((text if isinstance(text, bytes) else text.encode()) + good)
    found = index(audio)
    assert found.captions()["b.wav"] == ("good",)
    assert [row["detail"][: len(message)] for row in found.rows] == [message]
    assert found.info["skipped_reasons"] == {"malformed row": 1}


def test_a_captions_table_without_its_columns_is_the_users_mistake(audio: Path) -> None:
    music(audio / "a.wav")
    (audio / "captions.csv").write_text("song,words\na.wav,x")
    with pytest.raises(UserError, match=r"captions\.csv:1: its header has no column"):
        index(audio)


def test_nothing_to_use(audio: Path) -> None:
    with pytest.raises(UserError, match="holds no audio files"):
        index(audio)
    (audio / "notes.pdf").write_bytes(b"%PDF" * 100)
    with pytest.raises(UserError, match="holds no audio files"):
        index(audio)
    music(audio / "a.wav", 0.5)
    music(audio / "b.wav", 0.5)
    (audio / "c.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file in .* can be used \(2 too short, 1 empty\)"):
        index(audio)
    music(audio / "d.wav", 1.0)
    with pytest.raises(UserError, match="gives one clip"):
        index(audio)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("a.wav", "is a file")])
def test_not_a_folder(audio: Path, name: str, message: str) -> None:
    music(audio / "a.wav")
    with pytest.raises(UserError, match=message):
        index(audio / name)
    with pytest.raises(UserError, match=message):
        sources_fingerprint(DataConfig(audio=str(audio / name)))


def test_missing_captions_file(audio: Path) -> None:
    music(audio / "a.wav")
    with pytest.raises(UserError, match=r"data\.captions names words\.csv"):
        sources_fingerprint(DataConfig(audio=str(audio), captions="words.csv"))


def test_names_that_are_not_text_survive(audio: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(audio) + b"/caf\xe9.wav"))
    music(audio / "x.wav").rename(path)
    found = index(audio)
    assert {clip.path for clip in found.clips} == {str(path)}
    assert load_clip(found.corpus, found.clips[0], 8000).std() > 0.1


def test_a_file_that_changed_since(audio: Path) -> None:
    music(audio / "a.wav", 4.0)
    found = index(audio)
    music(audio / "a.wav", 1.0)
    with pytest.raises(UserError, match="changed since the corpus was made"):
        load_clip(found.corpus, found.clips[-1], 16_000)


def test_fingerprint_sees_every_change_and_only_changes(audio: Path) -> None:
    music(audio / "a.wav")
    words = audio.parent / "words.csv"
    words.write_text("file,caption\na.wav,x")

    def fingerprint() -> str:
        return sources_fingerprint(DataConfig(audio=str(audio), captions=str(words)))

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    music(audio / ".hidden" / "b.wav")
    (audio / "run").mkdir()
    (audio / "run" / "recipe.yaml").write_text("name: x")
    assert fingerprint() == seen[0]
    for change in (
        lambda: music(audio / "sub" / "b.wav"),
        lambda: music(audio / "a.wav", 3.0),
        lambda: os.utime(audio / "a.wav", (1, 1)),
        lambda: (audio / "a.txt").write_text("x"),
        lambda: words.write_text("file,caption\na.wav,y y"),
        lambda: (audio / "sub" / "b.wav").unlink(),
    ):
        change()
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
