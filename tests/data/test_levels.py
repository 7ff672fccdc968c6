from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pyloudnorm
import pytest
import soundfile

from data.audio import AudioError, downmix, pieces, probe, read
from data.config import DataConfig
from data.corpus import Clip, load_clip, read_clips, read_jsonl
from data.indexing import index_audio
from data.levels import check_clipping, loudness_gain
from data.progress import Progress

RATE = 24_000


def noise(seed: int, seconds: float = 2.0, level: float = 0.1) -> np.ndarray:
    return level * np.random.default_rng(seed).normal(size=round(seconds * RATE)).clip(-3, 3)


def whole_numbers(wave: np.ndarray) -> np.ndarray:
    """16-bit samples: from floats, the writer of FLAC rounds in another way than the one of WAV."""
    return np.round(32_767 * wave).astype(np.int16)


def index(folder: Path, audio: Path, **config: Any) -> tuple[list[Clip], list[dict], dict[str, Any]]:
    settings = DataConfig(audio=str(audio), **{"clip_seconds": 1.0, "validation": 0.3, **config})
    info = index_audio(folder, settings, 0, Progress())
    return read_clips(folder, short=True), read_jsonl(folder / "skipped.jsonl"), info


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    (tmp_path / "music").mkdir()
    return tmp_path / "music"


def test_mono_is_made_as_asked() -> None:
    samples = np.stack([np.full(4, 0.1), np.full(4, -0.5)], 1).astype(np.float32)
    assert downmix(samples, "mix") == pytest.approx(np.full(4, -0.2))
    assert downmix(samples, "left") == pytest.approx(np.full(4, 0.1))
    assert downmix(samples, "right") == pytest.approx(np.full(4, -0.5))
    assert downmix(samples, "loudest") == pytest.approx(np.full(4, -0.5))
    assert downmix(samples[:, :1], "right") == pytest.approx(np.full(4, 0.1))


def test_channels_reach_the_loader(tmp_path: Path, audio: Path) -> None:
    left, right = noise(0), noise(1, level=0.2)
    soundfile.write(audio / "a.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    soundfile.write(audio / "b.wav", noise(2), RATE, subtype="FLOAT")
    soundfile.write(audio / "c.wav", np.stack([noise(n) for n in range(3, 9)], 1), RATE, subtype="FLOAT")
    clips, _, _ = index(tmp_path, audio, channels="left")
    second = slice(RATE, 2 * RATE)
    np.testing.assert_allclose(load_clip(tmp_path, clips[1], RATE), left[second], atol=1e-6)
    stereo = load_clip(tmp_path, clips[1], RATE, channels=2)
    np.testing.assert_allclose(stereo, np.stack([left, right])[:, second], atol=1e-6)
    mono = load_clip(tmp_path, clips[3], RATE, channels=2)
    np.testing.assert_allclose(mono, np.stack([noise(2)] * 2)[:, second], atol=1e-6)
    six = load_clip(tmp_path, clips[5], 48_000, channels=2)
    assert six.shape == (2, 48_000)


def test_loudness_reaches_the_target_as_far_as_nothing_clips(tmp_path: Path, audio: Path) -> None:
    peaky = noise(1, level=0.01)
    peaky[::RATE] = 0.5
    soundfile.write(audio / "even.wav", noise(0), RATE, subtype="FLOAT")
    soundfile.write(audio / "peaky.wav", peaky, RATE, subtype="FLOAT")
    soundfile.write(audio / "short.wav", noise(2, 0.3), RATE, subtype="FLOAT")
    clips, _, _ = index(tmp_path, audio, loudness=-16.0, shortest_seconds=0.2)
    waves = [load_clip(tmp_path, clip, RATE) for clip in clips]
    meter = pyloudnorm.Meter(RATE)
    assert [meter.integrated_loudness(wave.astype(float)) for wave in waves[:2]] == pytest.approx([-16, -16], abs=0.05)
    assert np.abs(waves[2]).max() == pytest.approx(1.0)
    assert clips[2].gain == pytest.approx(2.0)
    assert clips[4].gain == 1.0  # shorter than what has a loudness


def test_silence_has_no_loudness() -> None:
    assert loudness_gain(np.zeros(RATE, np.float32), RATE, -14.0, 0.0) == 1.0


def test_a_loud_master_is_kept_and_a_clipped_recording_is_not(tmp_path: Path, audio: Path) -> None:
    tone = np.sin(2 * np.pi * 220.3 * np.arange(2 * RATE) / RATE)
    soundfile.write(audio / "master.wav", (noise(0, level=0.4)).clip(-1, 1), RATE)
    soundfile.write(audio / "clipped.wav", np.stack([0.1 * tone, (1.5 * tone).clip(-1, 1)], 1), RATE)
    clips, skipped, info = index(tmp_path, audio)
    assert {Path(clip.path).name for clip in clips} == {"master.wav"}
    assert [(row["file"], row["reason"]) for row in skipped] == [("clipped.wav", "clipped")]
    assert info["skipped_clips"] == {"clipped": 2}
    assert len(index(tmp_path, audio, most_clipped=None)[0]) == 4
    check_clipping(np.ones((10, 1)), most=1.0)


def test_the_same_music_in_another_container_is_a_duplicate(tmp_path: Path, audio: Path) -> None:
    for name in ("a.wav", "b.flac", "sub/c.aiff"):
        (audio / name).parent.mkdir(exist_ok=True)
        soundfile.write(audio / name, whole_numbers(noise(0)), RATE)
    other = np.concatenate([noise(1, 1.0), noise(0)[:RATE]])
    soundfile.write(audio / "other.wav", whole_numbers(other), RATE)
    clips, skipped, info = index(tmp_path, audio)
    assert [(Path(clip.path).name, clip.start) for clip in clips] == [("a.wav", 0), ("a.wav", 1), ("other.wav", 0)]
    assert [(row["file"], row["reason"], row["clips"]) for row in skipped] == [
        ("b.flac", "duplicate", 0), ("other.wav", "duplicate", 1), ("sub/c.aiff", "duplicate", 0),
    ]  # fmt: skip
    assert skipped[1]["detail"] == "at 1 s the same samples as a.wav at 0 s"
    assert info["skipped_clips"] == {"duplicate": 5}
    assert len(index(tmp_path, audio, duplicates="keep")[0]) == 8


def write_av(path: Path, waves: np.ndarray, codec: str, rate: int = RATE) -> Path:
    with av.open(str(path), "w") as container:
        layout = "mono" if len(waves) == 1 else "stereo"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(waves.astype(np.float32), format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        while block := fifo.read(stream.frame_size or 1024, partial=True):
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("a.m4a", "aac"), ("a.mp4", "aac"), ("a.aac", "aac"), ("a.wma", "wmav2"), ("a.mkv", "aac")]
)
def test_what_soundfile_does_not_read(tmp_path: Path, name: str, codec: str) -> None:
    seconds = np.arange(6 * RATE) / RATE
    chirp = 0.4 * np.sin(2 * np.pi * (200 + 100 * seconds) * seconds)
    path = write_av(tmp_path / name, np.stack([chirp, 0.5 * chirp]), codec)
    file = probe(path)
    assert (file.sample_rate, file.channels) == (RATE, 2)
    assert file.seconds == pytest.approx(6, abs=0.1)
    parts = list(pieces(path, 1.0))
    whole = np.concatenate([part.samples for part in parts])
    assert len(whole) == pytest.approx(6 * RATE, abs=2100)
    # Wherever one starts, the samples are those of the file read from its beginning.
    for start in (0.0, 0.3, 2.75, 4.0):
        first = round(start * RATE)
        sought = read(path, start, 1.0, RATE, channels=2)
        np.testing.assert_allclose(sought, whole[first : first + RATE].T, atol=5e-3)
    # An encoder may add a few frames of silence at the start, or take some away.
    size = 1 << 19
    products = np.fft.irfft(np.fft.rfft(whole[:, 0], size) * np.conj(np.fft.rfft(chirp, size)))
    assert products.max() > 0.95 * np.square(chirp).sum()
    assert min(products.argmax(), size - products.argmax()) < 2100


def test_a_cut_off_file_that_soundfile_does_not_read(tmp_path: Path) -> None:
    path = write_av(tmp_path / "a.mkv", noise(0, 6.0)[None], "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="truncated"):
        list(pieces(path, 1.0))
    assert read(path, 1.0, 1.0, RATE).std() > 0.05


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    write_av(tmp_path / "a.m4a", noise(0)[None], "aac")
    (tmp_path / "list.wav").write_text(f"#EXTM3U\n#EXTINF:2,\n{tmp_path}/a.m4a\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.wav").write_text(f"ffconcat version 1.0\nfile {tmp_path}/a.m4a\n")
    for name in ("list.wav", "concat.wav"):
        with pytest.raises(AudioError, match="unreadable"):
            probe(tmp_path / name)
