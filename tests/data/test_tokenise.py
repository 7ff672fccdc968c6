from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenising import CONFIG, SECONDS, Embedder, fit

import data.tokeniser
from data.config import TokensConfig
from data.corpus import Clip, read_clips, write_clips
from data.progress import Progress
from data.shards import first_records
from data.tokenise import tokenise
from data.windows import window_loader
from model import artifact
from model.config import EncodersConfig, JointEmbedderConfig
from model.encoders.base import embed_windows
from model.encoders.mel import MelCodec
from model.errors import UserError
from model.kmeans import ResidualKMeans


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, EncodersConfig]:
    """A corpus of four clips out of files of two rates, and encoders fitted to noise."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    clips = []
    for number, (rate, split, captions) in enumerate([
        (16_000, "train", ("a drum", "banana")), (44_100, "train", ()), (22_050, "validation", ("bell",)),
        (16_000, "held_out", ("x",)),
    ]):  # fmt: skip
        wave = np.random.default_rng(number).uniform(-0.5, 0.5, round(2.5 * rate))
        soundfile.write(corpus / f"{number}.wav", wave, rate)
        clips.append(Clip(f"clip-{number}", f"{number}.wav", 0.5, SECONDS, captions, split))
    write_clips(corpus, clips)
    fit(tmp_path)
    monkeypatch.setattr(data.tokeniser, "load_joint_embedder", lambda folder, config: Embedder())
    return corpus, CONFIG


def add_short(corpus: Path, *lengths: float) -> None:
    """Two more training clips of each of `lengths`, of audio that is there."""
    short = [
        Clip(f"short-{seconds}-{number}", f"{number}.wav", 0.5, seconds, ("short",), "train")
        for seconds in lengths
        for number in range(2)
    ]
    write_clips(corpus, [*read_clips(corpus), *short])


def run(made: tuple[Path, EncodersConfig], folder: Path) -> dict[str, Any]:
    corpus, config = made
    fitted = corpus.parent
    progress = Progress(folder / "progress.json")
    return tokenise(corpus, fitted, fitted, fitted, config, TokensConfig(), folder, progress)[0]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in first_records(folder, 1000)}


def test_records_hold_what_the_encoders_say(made: tuple[Path, EncodersConfig], tmp_path: Path) -> None:
    corpus, config = made
    info = run(made, tmp_path / "tokens")
    assert info["records"] == {"train": 2, "validation": 1}
    assert info["captions"] is True
    assert info["clip_seconds"] == SECONDS
    assert (info["hop_seconds"], info["embedding_seconds"]) == (0.5, 1.0)
    shapes = {name: (row["rate_hz"], row["quantizers"], row["codebook_size"]) for name, row in info["fields"].items()}
    assert shapes == {"acoustic": (25, 4, 16), "semantic": (50, 1, 16), "conditioning": (2, 3, 8)}
    rows = records(tmp_path / "tokens" / "train")
    assert list(rows) == ["clip-0", "clip-1"]
    for row in rows.values():
        assert row["acoustic"].shape == (50, 4)
        assert row["semantic"].shape == (100, 1)
        assert row["conditioning"].shape == (3, 3)
        assert {row[name].dtype for name in ("acoustic", "semantic", "conditioning")} == {np.dtype(np.uint16)}
    assert json.loads(rows["clip-0"]["captions"]) == ["a drum", "banana"]
    assert rows["clip-0"]["text_conditioning"].shape == (2, 3)
    assert rows["clip-1"]["text_conditioning"].shape == (0, 3)
    wave = torch.from_numpy(soundfile.read(corpus / "0.wav", dtype="float32")[0])[None, 8000:40_000]
    codec = MelCodec.load(tmp_path, config.codec)
    np.testing.assert_array_equal(rows["clip-0"]["acoustic"], codec.encode(wave)[0])
    quantizer = ResidualKMeans.load(tmp_path / "quantizers.safetensors", "conditioning")
    text = quantizer.encode(Embedder().embed_text(["a drum", "banana"]))
    np.testing.assert_array_equal(rows["clip-0"]["text_conditioning"], text)
    assert json.loads((tmp_path / "tokens" / "progress.json").read_text())["done"] == 3


def test_short_clips_keep_their_length_in_whole_frames_of_all_fields(
    made: tuple[Path, EncodersConfig], tmp_path: Path
) -> None:
    whole = run(made, tmp_path / "whole")
    add_short(made[0], 1.1, 0.53)
    info = run(made, tmp_path / "tokens")
    assert (info["clip_seconds"], info["shortest_seconds"]) == (SECONDS, 0.52)
    assert whole["shortest_seconds"] == SECONDS
    assert info["records"] == {"train": 6, "validation": 1}
    rows, before = records(tmp_path / "tokens" / "train"), records(tmp_path / "whole" / "train")
    # 1.1 s is 27.5 acoustic frames: of the half one nothing stays, nor of the semantic frame beside it.
    assert [rows[f"short-1.1-{number}"]["acoustic"].shape for number in range(2)] == [(27, 4)] * 2
    assert [rows[f"short-1.1-{number}"]["semantic"].shape for number in range(2)] == [(54, 1)] * 2
    assert [rows[f"short-0.53-{number}"]["semantic"].shape for number in range(2)] == [(26, 1)] * 2
    assert [rows[f"short-{seconds}-0"]["conditioning"].shape for seconds in ("1.1", "0.53")] == [(1, 3)] * 2
    # Away from its end a short clip has the codes of the same moment of the whole one.
    np.testing.assert_array_equal(rows["short-1.1-0"]["acoustic"][:20], before["clip-0"]["acoustic"][:20])
    for name, value in before["clip-1"].items():
        np.testing.assert_array_equal(rows["clip-1"][name], value)


def test_the_loader_reads_what_was_written(made: tuple[Path, EncodersConfig], tmp_path: Path) -> None:
    with artifact.create(tmp_path / "tokens", "tokens", "x") as (folder, info):
        info.update(run(made, folder))
    fields = ["semantic", "acoustic", "conditioning"]
    (batch,) = window_loader(tmp_path / "tokens", "train", fields, 1.0, batch=2, seed=0, global_batch=2)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "semantic": (2, 50, 1), "acoustic": (2, 25, 4), "conditioning": (2, 1, 3), "draw": (2,),
    }  # fmt: skip


@pytest.mark.parametrize(("seconds", "windows"), [(3.0, 5), (2.4, 3), (1.0, 1), (0.5, 1)])
def test_embedding_windows(seconds: float, windows: int) -> None:
    config = JointEmbedderConfig(window_seconds=1.0, hop_seconds=0.5)
    wave = torch.randn(2, round(seconds * 8000))
    found = embed_windows(Embedder(), wave, config)
    assert found.shape == (2, windows, 2)
    last = wave[:, (windows - 1) * 4000 : (windows - 1) * 4000 + 8000]
    torch.testing.assert_close(found[:, -1], Embedder().embed_audio(last))


def test_audio_that_changed(made: tuple[Path, EncodersConfig], tmp_path: Path) -> None:
    soundfile.write(made[0] / "1.wav", np.zeros(100), 16_000)
    with pytest.raises(UserError, match=r"1\.wav has changed since the corpus was made"):
        run(made, tmp_path / "tokens")
