"""Every kind of broken audio and manifest beside good files: it is used, or skipped with its reason, or refused in one
line; the good files are used all the same."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from broken_audio import RATE, cut, encoded, index, noise

from data.corpus import Clip
from model.errors import UserError

USED, PASSED_OVER = "used", "passed over"
GOOD = ("good 0.wav", "good 1.flac", "good 2.ogg")
pytestmark = pytest.mark.usefixtures("one_process")


def floats(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def with_value(value: float) -> bytes:
    wave = noise(1)
    wave[[100, RATE + 100, 2 * RATE + 100]] = value
    return floats(wave)


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(3000) + content[middle + 3000 :]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    folder = (tmp_path / "music").resolve()
    folder.mkdir()
    for number, name in enumerate(GOOD):
        (folder / name).write_bytes(encoded(number + 1000, name.rpartition(".")[2].upper()))
    return folder


def check_good(clips: list[Clip]) -> None:
    names = {Path(clip.path).name for clip in clips}
    assert names >= set(GOOD)


# Content of a file called broken.wav, and its fate: USED, PASSED_OVER or the reason it is skipped for.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated WAV": (lambda: cut(encoded(1)), "truncated"),
    "truncated FLAC": (lambda: cut(encoded(1, "FLAC")), "truncated"),
    "truncated MP3": (lambda: cut(encoded(1, "MP3")), "truncated"),
    "truncated OGG": (lambda: cut(encoded(1, "OGG")), "truncated"),
    "truncated AIFF": (lambda: cut(encoded(1, "AIFF")), "truncated"),
    "FLAC with a hole": (lambda: damaged(encoded(1, "FLAC")), "truncated"),
    "no bytes": (lambda: b"", "empty"),
    "header alone": (lambda: encoded(1)[:44], "empty"),
    "half a header": (lambda: encoded(1)[:20], "unreadable"),
    "no samples": (lambda: floats(np.zeros(0)), "empty"),
    "MP3 called WAV": (lambda: encoded(1, "MP3"), USED),
    "FLAC called WAV": (lambda: encoded(1, "FLAC"), USED),
    "not a number": (lambda: with_value(np.nan), "invalid samples"),
    "infinite": (lambda: with_value(np.inf), "invalid samples"),
    "minus infinite": (lambda: with_value(-np.inf), "invalid samples"),
    "integers as floats": (lambda: floats(20_000 * noise(1)), "invalid samples"),
    "largest float": (lambda: with_value(3e38), "invalid samples"),
    "8 bits": (lambda: encoded(1, subtype="PCM_U8"), USED),
    "24 bits": (lambda: encoded(1, subtype="PCM_24"), USED),
    "32-bit integers": (lambda: encoded(1, subtype="PCM_32"), USED),
    "64-bit floats": (lambda: encoded(1, subtype="DOUBLE"), USED),
    "A-law": (lambda: encoded(1, subtype="ALAW"), USED),
    "IMA ADPCM": (lambda: encoded(1, subtype="IMA_ADPCM"), USED),
    "6 channels": (lambda: encoded(1, channels=6), USED),
    "192 kHz": (lambda: encoded(1, rate=192_000), USED),
    "8 kHz": (lambda: encoded(1, rate=8_000), USED),
    "44,101 Hz": (lambda: encoded(1, rate=44_101), USED),
    "a rate of 1 Hz": (lambda: encoded(1)[:24] + b"\x01\0\0\0\x02\0\0\0" + encoded(1)[32:], "unreadable"),
    "1 sample": (lambda: floats(noise(1)[:1]), "too short"),
    "text called WAV": (lambda: b"these are the words of a song\n" * 200, "unreadable"),
    "picture called WAV": (lambda: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20, "unreadable"),
    "zeros called WAV": (lambda: bytes(10_000), "unreadable"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(50_000), "unreadable"),
    "web page called WAV": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "unreadable"),
    "silent": (lambda: floats(np.zeros(RATE * 3)), "silent"),
    "constant": (lambda: floats(np.full(RATE * 3, 0.7)), "silent"),
    "clipped": (lambda: floats(np.sign(noise(1))), "clipped"),
    "the music of another file": (lambda: encoded(1000), "duplicate"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file(tmp_path: Path, audio: Path, kind: str) -> None:
    make, fate = FILES[kind]
    (audio / "zz broken.wav").write_bytes(make())
    clips, skipped, info = index(tmp_path, audio)
    check_good(clips)
    used = [clip for clip in clips if Path(clip.path).name == "zz broken.wav"]
    if fate == USED:
        assert len(used) == 3
        assert skipped == []
        return
    assert [(row["file"], row["reason"]) for row in skipped] == [("zz broken.wav", fate)]
    assert skipped[0]["detail"]
    assert skipped[0]["clips"] == len(used)
    assert len(used) in ((0, 1, 2) if fate == "truncated" else (0,))
    assert info["skipped_reasons"] == {fate: 1}


def loop(folder: Path) -> None:
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "inner").mkdir()
    (folder / "inner" / "up").symlink_to(folder)


def not_text(folder: Path) -> None:
    (folder / "x.wav").write_bytes(encoded(1))
    os.rename(folder / "x.wav", os.fsencode(folder) + b"/caf\xe9.wav")


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "loops of links": (loop, PASSED_OVER),
    "a link to nothing": (lambda folder: (folder / "x.wav").symlink_to(folder / "nothing.wav"), PASSED_OVER),
    "a folder called x.wav": (lambda folder: (folder / "x.wav").mkdir(), PASSED_OVER),
    "a pipe called x.wav": (lambda folder: os.mkfifo(folder / "x.wav"), PASSED_OVER),
    "a name that is no text": (not_text, USED),
    "a name with odd characters": (lambda f: (f / "a #{1..3}\n?*[x]:+.wav").write_bytes(encoded(1)), USED),
    "a picture": (lambda folder: (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff" * 1000), PASSED_OVER),
    "a second link to a file": (lambda folder: (folder / "x.wav").symlink_to(folder / GOOD[0]), PASSED_OVER),
}


@pytest.mark.parametrize("kind", PLACES)
def test_an_odd_place(tmp_path: Path, audio: Path, kind: str) -> None:
    make, fate = PLACES[kind]
    make(audio)
    clips, skipped, _ = index(tmp_path, audio)
    check_good(clips)
    assert skipped == []
    assert len(clips) == (12 if fate == USED else 9)


def test_a_file_that_may_not_be_read(tmp_path: Path, audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (audio / "locked.wav").write_bytes(encoded(1))
    real = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("locked.wav"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)  # the superuser may read everything
    clips, skipped, _ = index(tmp_path, audio)
    check_good(clips)
    assert [(row["file"], row["reason"], row["detail"]) for row in skipped] == [
        ("locked.wav", "unreadable", "Permission denied")
    ]


def line(**row: Any) -> bytes:
    return json.dumps(row).encode()


# The second of three rows of a manifest, and its fate: USED or the reason it is skipped for, with part of the detail.
ROWS: dict[str, tuple[bytes, str, str]] = {
    "not JSON": (b'{"path": "x.wav"', "malformed row", "line 2: not JSON"),
    "a list": (b'["x.wav"]', "malformed row", "line 2: not an object"),
    "nested without end": (b"[" * 100_000, "malformed row", "line 2: not JSON"),
    "no column for the audio": (line(song="x.wav"), "malformed row", "line 2: it has no column for the audio"),
    "no name": (line(path="  "), "malformed row", "line 2: its path is not the name of a file"),
    "a number for a name": (line(path=3), "malformed row", "its path is not the name"),
    "a null byte": (line(path="x\0.wav"), "malformed row", "its path is not the name"),
    "an address": (line(path="https://example.com/x.wav"), "malformed row", "`stretto collect` fetches these"),
    "a missing file": (line(path="nowhere.wav"), "missing", "No such file"),
    "a folder": (line(path="."), "unreadable", "Is a directory"),
    "a pipe": (line(path="pipe.wav"), "unreadable", "a pipe or a device"),
    "a name far too long": (line(path="x" * 5000), "unreadable", "File name too long"),
    "a loop of links": (line(path="loop.wav"), "unreadable", "symbolic links"),
    "outside of the folder": (line(path="../outside.wav"), USED, ""),
    "negative start": (line(path="x.wav", start=-1), "malformed row", "its start, -1 s, is negative"),
    "negative end": (line(path="x.wav", end=-1), "malformed row", "its end, -1 s, is negative"),
    "end before start": (line(path="x.wav", start=2, end=1), "malformed row", "its end, 1 s, is not after its start"),
    "end at start": (line(path="x.wav", start=1, end=1), "malformed row", "is not after its start"),
    "start beyond the end": (line(path="x.wav", start=99), "wrong times", "it ends before the start asked for, 99 s"),
    "start beyond all": (line(path="x.wav", start=1e300), "wrong times", "it ends before the start asked for"),
    "a stretch too short": (line(path="x.wav", start=1, end=1.2), "too short", "it lasts 0.20 s"),
    "words for a start": (line(path="x.wav", start="soon"), "malformed row", "its start is 'soon', not a number"),
    "start that is no number": (b'{"path": "x.wav", "start": NaN}', "malformed row", "its start is 'nan'"),
    "infinite end": (b'{"path": "x.wav", "end": Infinity}', "malformed row", "its end is 'inf'"),
    "start that is true": (line(path="x.wav", start=True), "malformed row", "its start is 'True'"),
    "unknown split": (line(path="x.wav", split="tain"), "malformed row", "its split is 'tain', not train, validation"),
    "caption that is no text": (line(path="x.wav", caption=3), "malformed row", "its caption is neither text nor a"),
    "tags that are none": (line(path="x.wav", tags=True), "malformed row", "tags must be text"),
    "not UTF-8": (b'{"path": "x.wav", "caption": "caf\xe9"}', "malformed row", "its caption is not UTF-8 text"),
    "a column of a document": (line(path="x.wav", note="x" * 100_000), "malformed row", "note has 100,000 characters"),
    "an id that is there": (line(path="x.wav", id="one"), "duplicate id", "id one stands there before"),
    "a row that is there": (line(path=GOOD[0]), "duplicate row", f"{GOOD[0]} from 0 stands there before"),
    "nothing": (b"   ", USED, ""),
    "empty values": (line(path="x.wav", start="", end=None, split="", id="", caption=None, tags=None), USED, ""),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_broken_row(tmp_path: Path, audio: Path, kind: str) -> None:
    row, fate, detail = ROWS[kind]
    (audio / "x.wav").write_bytes(encoded(1))
    (audio.parent / "outside.wav").write_bytes(encoded(2))
    os.mkfifo(audio / "pipe.wav")
    (audio / "loop.wav").symlink_to(audio / "loop.wav")
    first = line(path=GOOD[0], **({"id": "one"} if kind == "an id that is there" else {}))
    (audio / "songs.jsonl").write_bytes(b"\n".join([first, row, line(path=GOOD[1]), line(path=GOOD[2])]))
    clips, skipped, _ = index(tmp_path, audio / "songs.jsonl")
    check_good(clips)
    if fate == USED:
        assert skipped == []
        assert len(clips) == (9 if kind == "nothing" else 12)
        return
    assert [row["reason"] for row in skipped] == [fate]
    assert detail in skipped[0]["detail"]
    assert len(clips) == 9


def test_an_end_beyond_the_end_is_said_and_what_there_is_used(tmp_path: Path, audio: Path) -> None:
    rows = [line(path=GOOD[0], end=99), line(path=GOOD[1], end=3.05), line(path=GOOD[2])]
    (audio / "songs.jsonl").write_bytes(b"\n".join(rows))
    clips, skipped, _ = index(tmp_path, audio / "songs.jsonl")
    assert len(clips) == 9
    assert [(row["file"], row["reason"], row["clips"]) for row in skipped] == [(GOOD[0], "wrong times", 3)]


MANIFESTS: dict[str, tuple[str, bytes]] = {
    "byte order mark": ("songs.jsonl", b"\xef\xbb\xbf" + b"\n".join(line(path=name) for name in GOOD)),
    "mixed line ends": ("songs.jsonl", b"%b\r\n%b\r%b\n" % tuple(line(path=name) for name in GOOD)),
    "UTF-16": ("songs.csv", ("path,caption\r\n" + "\r\n".join(f"{name},ü" for name in GOOD)).encode("utf-16")),
    "CSV with a BOM and mixed line ends": ("songs.csv", b"\xef\xbb\xbfPath\r\n" + "\n".join(GOOD).encode() + b"\r"),
    "CSV with a row too long": ("songs.csv", b"path,x\n" + "\n".join(f"{n},1" for n in GOOD).encode() + b"\nx,1,2,3"),
    "CSV with a row too short": ("songs.csv", b"x,path\n" + "\n".join(f"1,{n}" for n in GOOD).encode() + b"\n1"),
    "CSV with a stray quote": ("songs.csv", b'path,x\nx.wav,"a" b\n' + "\n".join(f"{n},1" for n in GOOD).encode()),
    "CSV with an open quote": ("songs.csv", b"path,x\n" + "\n".join(f"{n},1" for n in GOOD).encode() + b'\nx.wav,"a'),
    "empty lines": ("songs.jsonl", b"\n\n".join(line(path=name) for name in GOOD) + b"\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_odd_manifest(tmp_path: Path, audio: Path, kind: str) -> None:
    name, content = MANIFESTS[kind]
    (audio / name).write_bytes(content)
    clips, skipped, _ = index(tmp_path, audio / name)
    check_good(clips)
    assert len(clips) == 9
    assert [row["reason"] for row in skipped] == (["malformed row"] if "row" in kind or "quote" in kind else [])


UNUSABLE: dict[str, tuple[str, bytes, str]] = {
    "empty": ("songs.jsonl", b"", "has no rows"),
    "empty table": ("songs.csv", b"", "has no rows"),
    "header alone": ("songs.csv", b"path,caption\n", "has no rows"),
    "no column for the audio": ("songs.csv", b"song,words\na.wav,x\n", r"no row that can be used \(1 malformed\)"),
    "a sound called manifest": ("songs.jsonl", encoded(1), "no row that can be used"),
    "files that are all gone": ("songs.jsonl", line(path="x.wav"), "no file in .* can be used"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_manifest_of_no_use_is_refused_in_one_line(tmp_path: Path, audio: Path, kind: str) -> None:
    name, content, message = UNUSABLE[kind]
    (audio / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        index(tmp_path, audio / name)
    assert "\n" not in str(error.value)


def test_all_kinds_in_one_job(tmp_path: Path, audio: Path) -> None:
    for number, (make, _) in enumerate(FILES.values()):
        (audio / f"zz {number:02}.wav").write_bytes(make())
    loop(audio)
    not_text(audio)
    os.mkfifo(audio / "pipe.wav")
    clips, skipped, info = index(tmp_path, audio)
    check_good(clips)
    reasons = {fate for _, fate in FILES.values()} - {USED}
    assert set(info["skipped_reasons"]) == reasons
    assert info["skipped"] == len(skipped)
    assert {clip.split for clip in clips} == {"train", "validation"}
