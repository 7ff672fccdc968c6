"""Fitting the codec and the quantizers: from a corpus folder to what the next stages load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from data import vector_file
from data.corpus import TRAIN, VALIDATION, Clip, write_clips
from data.progress import Progress
from data.ranks import Ranks
from model import artifact
from model.config import CodecConfig, EncodersConfig, JointEmbedderConfig, KMeansConfig, QuantizersConfig
from model.encoders import load_codec
from model.encoders.towers import TwoTowers, fit_tokenizer
from model.errors import UserError
from model.fields import TokenField
from model.kmeans import ResidualKMeans
from trainer import encodings
from trainer.encodings import read_waves, some
from trainer.fitting import fit_codec, fit_quantizers
from trainer.quantizer_report import Tally

RATE = 16_000
NOTES = (110, 165, 220, 330, 440, 660)
CODEC = CodecConfig(quantizers=3, codebook_size=32, fit_clips=12)
JOINT = JointEmbedderConfig(dim=16, width=64, window_seconds=1.0, hop_seconds=0.5)
QUANTIZERS = QuantizersConfig(
    conditioning=KMeansConfig(levels=3, codebook_size=8), semantic=KMeansConfig(levels=1, codebook_size=16)
)


def melody(random: np.random.Generator) -> np.ndarray:
    """Two seconds of eight decaying notes."""
    time = np.arange(RATE // 4) / RATE
    notes = [np.sin(2 * np.pi * random.choice(NOTES) * time) * np.exp(-6 * time) for _ in range(8)]
    return (0.4 * np.concatenate(notes)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    clips = []
    for index in range(20):
        soundfile.write(folder / f"{index}.flac", melody(random), RATE)
        split = TRAIN if index < 16 else VALIDATION
        clips.append(Clip(str(index), f"{index}.flac", 0.0, 2.0, ("plucked notes", f"melody {index}"), split))
    write_clips(folder, clips)
    return folder


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    TwoTowers(JOINT, fit_tokenizer(["plucked notes", "melody 12"], 60)).save(folder)
    return folder


def test_codec_is_fitted_and_saved(corpus, tmp_path):
    info = fit_codec(corpus, CODEC, 0, tmp_path, Progress())
    assert info["field"] == TokenField("acoustic", 25, 3, 32).to_json()
    assert len(info["variance_left"]) == 3
    assert info["variance_left"] == sorted(info["variance_left"], reverse=True)
    assert info["variance_left"][-1] < 0.2
    codec = load_codec(tmp_path, CODEC)
    wave = torch.from_numpy(melody(np.random.default_rng(5)))[None]
    again = codec.decode(codec.encode(wave))
    loudness = [x.view(-1, 800).square().mean(1).sqrt() for x in (wave, again)]
    assert np.corrcoef(*loudness)[0, 1] > 0.9  # the notes begin and fade where they did
    assert codec.decode(codec.encode(torch.zeros(1, RATE))).abs().max() < 0.02


def test_fits_are_the_same_for_a_seed(corpus, embedding, tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        seed = 1 if name == "three" else 0
        fit_codec(corpus, CODEC, seed, tmp_path / name, Progress())
        fit_quantizers(corpus, embedding, EncodersConfig(joint=JOINT), QUANTIZERS, seed, tmp_path / name, Progress())
    for file in ("codec.safetensors", "quantizers.safetensors"):
        one, two, three = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "three"))
        assert one == two != three


def test_ranks_fit_the_same_quantizers(corpus, embedding, tmp_path):
    for count in (1, 2):
        (tmp_path / f"{count}").mkdir()
        run_ranks(fit_as_rank, count, tmp_path / f"logs-{count}", corpus, embedding, tmp_path / f"{count}")
    one, two = (load_file(tmp_path / count / "quantizers.safetensors") for count in ("1", "2"))
    reports = [json.loads((tmp_path / count / "report.json").read_text()) for count in ("1", "2")]
    vectors = {"conditioning": torch.randn(500, 16), "semantic": torch.randn(500, 92)}
    for name, x in vectors.items():
        assert (one[name] - two[name]).abs().max() < 1e-5
        codes = [ResidualKMeans.from_centroids(centroids[name]).encode(x) for centroids in (one, two)]
        assert torch.equal(*codes)
    for kind, split in (("audio", "train"), ("text", "validation")):
        rows = [report["conditioning"][kind][split] for report in reports]
        assert rows[0]["vectors"] == rows[1]["vectors"]
        assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"])
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == ["quantizers.safetensors", "report.json"]


def fit_as_rank(corpus: Path, embedding: Path, folder: Path) -> None:
    encodings.BATCH_SECONDS = 6.0  # three clips a batch, so that every rank has several
    with Ranks.joined() as ranks:
        info = fit_quantizers(corpus, embedding, EncodersConfig(joint=JOINT), QUANTIZERS, 0, folder, Progress(), ranks)
        assert len(set(ranks.gathered(json.dumps(info)))) == 1


def test_report_says_what_each_level_leaves_and_uses(corpus, embedding, tmp_path):
    info = fit_quantizers(corpus, embedding, EncodersConfig(joint=JOINT), QUANTIZERS, 0, tmp_path, Progress())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {name: row["measured"] for name, row in info.items()}
    assert {name: set(kinds) for name, kinds in report.items()} == {
        "conditioning": {"audio", "text"},
        "semantic": {"features"},
    }
    # 16 and 4 clips of 2 s: 3 embeddings of 1 s each, 2 captions, 50 features.
    counts = {kind: [row["vectors"] for row in splits.values()] for kind, splits in report["conditioning"].items()}
    assert counts == {"audio": [48, 12], "text": [32, 8]}
    assert [row["vectors"] for row in report["semantic"]["features"].values()] == [800, 200]
    for row in [*report["conditioning"]["audio"].values(), report["semantic"]["features"]["train"]]:
        assert row["variance_left"] == sorted(row["variance_left"], reverse=True)
        for usage, perplexity in zip(row["usage"], row["perplexity"], strict=True):
            assert 0 < usage <= 1 <= perplexity
            assert perplexity <= usage * 16 + 1e-9
    assert info["semantic"]["vectors"] == 800
    assert report["semantic"]["features"]["train"]["variance_left"] == pytest.approx(info["semantic"]["variance_left"])


def test_tally_counts_by_hand():
    quantizer = ResidualKMeans.from_centroids(
        torch.tensor([[[0.0], [10.0], [90.0], [99.0]], [[0.0], [1.0], [5.0], [7.0]]])
    )
    tally = Tally(quantizer)
    tally.add(torch.tensor([[0.0], [1.0]]))
    tally.add(torch.tensor([[10.0], [11.0]]))
    result = tally.result(Ranks())
    variance = 25.25  # of 0, 1, 10, 11
    assert result["vectors"] == 4
    assert result["variance_left"] == pytest.approx([0.5 / variance, 0])
    assert result["usage"] == [0.5, 0.5]
    assert result["perplexity"] == pytest.approx([2, 2])


@pytest.mark.parametrize(("limit", "used"), [(300, 300), (700, 700), (5000, 800), (None, 800)])
def test_vectors_are_limited(corpus, embedding, tmp_path, limit, used):
    config = QuantizersConfig(
        conditioning=KMeansConfig(levels=1, codebook_size=4, iterations=1),
        semantic=KMeansConfig(levels=1, codebook_size=8, iterations=1, fit_vectors=limit, start="sample"),
    )
    info = fit_quantizers(corpus, embedding, EncodersConfig(joint=JOINT), config, 0, tmp_path, Progress())
    assert info["semantic"]["vectors"] == used


def test_too_small_a_disk_is_named_before_anything_is_encoded(corpus, embedding, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(
        UserError, match=r"the fit of quantizers.semantic keeps 800 vectors of 92 .*semantic.fit_vectors"
    ):
        fit_quantizers(corpus, embedding, EncodersConfig(joint=JOINT), QUANTIZERS, 0, tmp_path, Progress())
    assert not list(tmp_path.iterdir())


def test_quantizers_of_audio_and_text(corpus, embedding, tmp_path):
    encoders = EncodersConfig(joint=JOINT)
    info = fit_quantizers(corpus, embedding, encoders, QUANTIZERS, 0, tmp_path, Progress(tmp_path / "p" / "q.json"))
    centroids = load_file(tmp_path / "quantizers.safetensors")
    assert centroids["conditioning"].shape == (3, 8, 16)
    assert centroids["semantic"].shape == (1, 16, 92)
    for name, levels in (("conditioning", 3), ("semantic", 1)):
        assert info[name]["levels"] == len(info[name]["variance_left"]) == levels
        assert info[name]["dim"] == centroids[name].shape[2]
    # Both kinds of embedding find centroids near them, though they lie apart.
    towers = TwoTowers.load(embedding, JOINT)
    quantizer = ResidualKMeans.from_centroids(centroids["conditioning"])
    audio = towers.embed_audio(torch.from_numpy(melody(np.random.default_rng(7)))[None, :RATE])
    for vectors in (audio, towers.embed_text(["plucked notes"])):
        assert (quantizer.decode(quantizer.encode(vectors)) - vectors).norm() < 0.35


def test_given_quantizers_take_the_place_of_a_fit_and_are_measured(corpus, embedding, tmp_path):
    """One of them; the other is fitted."""
    encoders = EncodersConfig(joint=JOINT)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    fitted = fit_quantizers(corpus, embedding, encoders, QUANTIZERS, 0, tmp_path / "first", Progress())
    artifact.write_manifest(tmp_path / "first", "quantizers", "f" * 16, info=fitted)
    given = QUANTIZERS.semantic.model_copy(update={"centroids": str(tmp_path / "first")})
    config = QUANTIZERS.model_copy(update={"semantic": given})
    info = fit_quantizers(corpus, embedding, encoders, config, 1, tmp_path / "second", Progress())
    first, second = (load_file(tmp_path / name / "quantizers.safetensors") for name in ("first", "second"))
    assert torch.equal(first["semantic"], second["semantic"])
    assert not torch.equal(first["conditioning"], second["conditioning"])
    assert info["semantic"]["given"]["vectors"] == fitted["semantic"]["vectors"]
    assert "vectors" not in info["semantic"]
    assert 0 < info["semantic"]["measured"]["features"]["train"]["variance_left"][0] < 1


def test_quantizers_without_captions(corpus, embedding, tmp_path):
    clips = [Clip(str(i), str(corpus / f"{i}.flac"), 0.0, 2.0, (), TRAIN) for i in range(6)]
    write_clips(tmp_path, clips)
    info = fit_quantizers(tmp_path, embedding, EncodersConfig(joint=JOINT), QUANTIZERS, 0, tmp_path, Progress())
    assert info["conditioning"]["variance_left"][-1] < 0.5


def test_waves_come_in_order_and_resampled(corpus):
    clips = [Clip(str(i), f"{i}.flac", 0.5, 0.25, (), TRAIN) for i in range(7)]
    batches = list(read_waves(corpus, clips, 8_000))
    assert [done for done, _ in batches] == [7]
    assert batches[0][1].shape == (7, 2_000)
    long = [Clip(str(i), f"{i}.flac", 0.0, 2.0, (), TRAIN) for i in (3, 1, 2)]
    waves = torch.cat([wave for _, wave in read_waves(corpus, long * 30, RATE)])
    assert [done for done, _ in read_waves(corpus, long * 30, RATE)] == [40, 80, 90]
    assert torch.equal(waves[:3].repeat(30, 1), waves)
    assert not torch.equal(waves[0], waves[1])


def test_some_are_drawn_in_order():
    drawn = some(list(range(100)), 10, 0)
    assert drawn == sorted(drawn) == some(list(range(100)), 10, 0)
    assert len(drawn) == 10
    assert some([1, 2], 10, 0) == [1, 2]


def test_ranks_read_their_batches_in_turn(corpus):
    clips = [Clip(str(i), f"{i % 20}.flac", 0.0, 2.0, (), TRAIN) for i in range(90)]
    dealt = [list(read_waves(corpus, clips, RATE, Ranks(rank, 2))) for rank in (0, 1)]
    assert [[done for done, _ in part] for part in dealt] == [[40, 90], [80]]
    assert [len(waves) for part in dealt for _, waves in part] == [40, 10, 40]
    assert list(read_waves(corpus, clips, RATE, Ranks(3, 4))) == []
