from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import AudioError, pieces, probe, read_mono
from data.levels import check_samples, check_silence

FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path: Path, wave: np.ndarray, rate: int, kind: str) -> Path:
    soundfile.write(path, wave, rate, format=kind.upper(), subtype=FORMATS[kind])
    return path


def length(path: Path, seconds: float = 1.0) -> float:
    return sum(piece.seconds for piece in pieces(path, seconds))


def fault(path: Path) -> tuple[str, float]:
    """The reason a file is faulty and the seconds that can be read before."""
    read = 0.0
    try:
        for piece in pieces(path, 1.0):
            read += piece.seconds
    except AudioError as error:
        return error.reason, read
    pytest.fail("no fault was found")


@pytest.mark.parametrize("kind", FORMATS)
def test_goes_by_content_and_averages_channels(tmp_path: Path, kind: str) -> None:
    wave = tone(3, 44_100)
    path = write(tmp_path / "a.bin", np.stack([wave, 0 * wave], 1), 44_100, kind)
    file = probe(path)
    assert (file.format, file.sample_rate, file.channels) == (kind.upper(), 44_100, 2)
    assert file.seconds == pytest.approx(3, abs=0.1)
    read = read_mono(path, 1.0, 1.0, 16_000)
    assert read.dtype == np.float32
    assert read.shape == (16_000,)
    assert np.abs(read).max() == pytest.approx(0.25, abs=0.03)
    spectrum = np.abs(np.fft.rfft(read))
    assert spectrum.argmax() == 440


def test_seeks_to_the_sample_and_pads_with_silence(tmp_path: Path) -> None:
    wave = np.linspace(-0.9, 0.9, 8000 * 3).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    np.testing.assert_array_equal(read_mono(tmp_path / "a.wav", 1.5, 1.0, 8000), wave[12_000:20_000])
    padded = read_mono(tmp_path / "a.wav", 2.05, 1.0, 8000)
    np.testing.assert_array_equal(padded[:7600], wave[16_400:])
    assert not padded[7600:].any()


def test_pieces_join_to_the_whole(tmp_path: Path) -> None:
    wave = tone(2.5, 11_025).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 11_025, subtype="FLOAT")
    parts = list(pieces(tmp_path / "a.wav", 0.7))
    assert [part.start for part in parts] == pytest.approx([0, 0.7, 1.4, 2.1])
    np.testing.assert_array_equal(np.concatenate([part.samples for part in parts])[:, 0], wave)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_gives_what_it_still_holds(tmp_path: Path, kind: str) -> None:
    path = write(
        tmp_path / f"a.{kind}", tone(8, 22_050) + 0.01 * np.random.default_rng(0).normal(size=176_400), 22_050, kind
    )
    assert length(path) == pytest.approx(8, abs=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    reason, read = fault(path)
    assert reason == "truncated"
    assert 3 < read < 6
    assert read_mono(path, 1.0, 1.0, 22_050).std() > 0.3
    with pytest.raises(AudioError, match="truncated"):
        read_mono(path, 6.0, 1.0, 22_050)


def test_damage_in_the_middle_keeps_what_comes_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 22_050 * 8), 22_050, "flac")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    reason, read = fault(path)
    assert reason == "truncated"
    assert 2.5 < read < 4.5
    assert read_mono(path, 2.0, 0.5, 22_050).shape == (11_025,)


def test_a_header_of_unknown_length_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(2, 8000), 8000, "wav")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert length(path) == pytest.approx(2)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"RIFF nonsense" * 50, "unreadable"), (bytes(5000), "unreadable")]
)
def test_what_is_no_audio(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    for use in (probe, length, lambda path: read_mono(path, 0, 1, 8000)):
        with pytest.raises(AudioError) as error:
            use(tmp_path / "a.wav")
        assert error.value.reason == reason


def test_no_samples_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(0), 8000, "wav")
    assert fault(tmp_path / "a.wav") == ("empty", 0)


def check(wave: np.ndarray) -> None:
    check_samples(wave)
    check_silence(wave, 8000, -60.0)


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.zeros(8000), "silent"),
        (np.full(8000, 0.5), "silent"),  # a constant is no sound
        (1e-4 * tone(1, 8000), "silent"),
        (np.where(np.arange(8000) == 5, np.nan, 0.1), "invalid samples"),
        (np.where(np.arange(8000) == 5, np.inf, 0.1), "invalid samples"),
        (20_000 * tone(1, 8000), "invalid samples"),
    ],
)
def test_check_names_the_fault(wave: np.ndarray, reason: str) -> None:
    with pytest.raises(AudioError) as error:
        check(wave.astype(np.float32))
    assert error.value.reason == reason


def test_check_takes_quiet_music_with_one_loud_moment() -> None:
    wave = np.zeros(8000, np.float32)
    wave[4000:4400] = 0.01 * tone(0.05, 8000)
    check(wave)
