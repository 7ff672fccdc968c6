"""EnCodec, MERT and CLAP at small size with random weights: same interfaces, one clock, plain words for mistakes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_encoders import CLAP, CODEC, MERT, Evil, noise, save_clap, save_encodec, save_mert

from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig
from model.encoders import (
    base,
    encoder_fingerprint,
    hubert,
    load_codec,
    load_joint_embedder,
    load_semantic_encoder,
)
from model.encoders.base import Codec, JointEmbedder, SemanticEncoder, embed_windows
from model.encoders.pretrained import how_to_get
from model.errors import UserError
from model.kmeans import ResidualKMeans


@pytest.fixture(scope="module")
def encodec(tmp_path_factory):
    return save_encodec(tmp_path_factory.mktemp("encodec"))


@pytest.fixture(scope="module")
def mert(tmp_path_factory):
    return save_mert(tmp_path_factory.mktemp("mert"))


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("clap"))


def test_encodec_codes_and_wave(encodec):
    codec = load_codec(encodec, CodecConfig(**CODEC, weights=str(encodec)))
    assert isinstance(codec, Codec)
    codes = codec.encode(noise(24_000, 1.01))
    assert codes.shape == (2, 75, 4)
    assert codes.dtype == torch.int64
    assert all(len(codes[..., level].unique()) > 1 for level in range(4))
    assert codec.decode(codes).shape == (2, 24_000)
    assert codec.encode(noise(24_000, 0.001)).shape == (2, 0, 4)


def test_encodec_is_the_model_it_wraps(encodec):
    from transformers import EncodecModel

    model = EncodecModel.from_pretrained(encodec).eval()
    x = noise(24_000, 1.0)
    with torch.no_grad():
        expected = model.encode(x[:, None], bandwidth=1.8).audio_codes[0].transpose(1, 2)
    assert torch.equal(load_codec(encodec, CodecConfig(**CODEC, weights=str(encodec))).encode(x), expected)


def test_encodec_saves_a_note_and_no_weights(encodec, tmp_path):
    config = CodecConfig(**CODEC, weights=str(encodec))
    load_codec(encodec, config).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained.json"]
    assert json.loads((tmp_path / "pretrained.json").read_text())["weights"] == str(encodec)
    assert load_codec(tmp_path, config).field.quantizers == 4


def test_other_weights_than_those_noted_are_refused(encodec, tmp_path):
    """They may lie elsewhere, but they must be the same."""
    note, moved = tmp_path / "codec", shutil.copytree(encodec, tmp_path / "moved")
    note.mkdir()
    load_codec(encodec, CodecConfig(**CODEC, weights=str(encodec))).save(note)
    config = CodecConfig(**CODEC, weights=str(moved))
    assert load_codec(note, config).field.quantizers == 4
    shutil.rmtree(moved)
    save_encodec(moved, stereo=True)
    refusal = pytest.raises(UserError, match=r"encoders\.codec\.weights: the weights of .*moved here are not those")
    with refusal:
        load_codec(note, config)
    (moved / "model.safetensors").rename(moved / "pytorch_model.bin")  # a name that the note does not know
    with refusal:
        load_codec(note, config)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("facebook/encodec_24khz", "`hf download facebook/encodec_24khz`"),
        ("/somewhere/encodec_24khz-d7cc33bc.th", "https://dl.fbaipublicfiles.com/encodec"),
        ("/somewhere/ours", "a folder called ours"),
    ],
)
def test_it_is_said_where_weights_come_from(weights, words):
    assert words in how_to_get(CodecConfig(**{**CODEC, "weights": weights}))


@pytest.mark.parametrize(
    ("key", "value"), [("quantizers", 3), ("sample_rate", 16_000), ("frame_rate", 50), ("codebook_size", 1024)]
)
def test_encodec_that_does_not_fit_the_recipe(encodec, key, value):
    with pytest.raises(UserError, match=rf"encoders\.codec\.{key}"):
        load_codec(encodec, CodecConfig(**{**CODEC, "weights": str(encodec), key: value}))


@pytest.mark.parametrize("seconds", [1.0, 1.019, 0.02])
def test_mert_gives_whole_frames(mert, seconds):
    encoder = load_semantic_encoder(SemanticEncoderConfig(**MERT, weights=str(mert)))
    assert isinstance(encoder, SemanticEncoder)
    assert encoder.rate_hz == 50
    assert encoder.features(noise(16_000, seconds)).shape == (2, int(seconds * 50), 32)


def test_mert_layer_is_that_of_the_whole_model(mert):
    from transformers import HubertModel

    encoder = load_semantic_encoder(SemanticEncoderConfig(**MERT, weights=str(mert)))
    model = HubertModel.from_pretrained(mert).eval()
    x = noise(16_000, 1.0)
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-7).sqrt()
    with torch.no_grad():
        expected = model(torch.nn.functional.pad(normal, (40, 40)), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(encoder.features(x), expected, atol=1e-5)


def test_hubert_is_the_same_by_another_name(mert):
    config = {"sample_rate": 16_000, "frame_rate": 50, "layer": 3, "weights": str(mert)}
    mert_, hubert = (load_semantic_encoder(SemanticEncoderConfig(kind=kind, **config)) for kind in ("mert", "hubert"))
    x = noise(16_000, 0.5)
    assert torch.equal(mert_.features(x), hubert.features(x))
    with pytest.raises(UserError, match="must be a folder"):
        load_semantic_encoder(SemanticEncoderConfig(kind="hubert", weights=str(mert / "model.safetensors")))


def test_long_waves_have_nearly_the_features_of_the_whole(mert, monkeypatch):
    encoder = load_semantic_encoder(SemanticEncoderConfig(**MERT, weights=str(mert)))
    generator = torch.Generator().manual_seed(0)
    notes = (110 * 2 ** (torch.randint(24, (60,), generator=generator) / 12)).repeat_interleave(8_000)
    loudness = torch.rand(60, generator=generator).repeat_interleave(8_000)
    tones = (2 * torch.pi * torch.cumsum(notes, 0) / 16_000).sin() * 0.3 * loudness
    x = (tones + 0.05 * torch.randn(480_000, generator=generator))[None]
    whole = encoder.features(x)
    codes = ResidualKMeans(1, 64, 32)
    codes.fit([whole[0]], iterations=10)
    monkeypatch.setattr(hubert, "CHUNK_SECONDS", 12.0)
    chunked = encoder.features(x)
    assert chunked.shape == whole.shape
    assert not torch.equal(chunked, whole)
    assert torch.cosine_similarity(chunked, whole, -1).mean() > 0.998
    assert (codes.encode(chunked) == codes.encode(whole)).float().mean() > 0.95


def test_mert_v1_as_the_hub_has_it(tmp_path):
    """Three layers of its true width: a pickle of tensors, a configuration that asks for code of its own, and the
    positional convolution under the names of before torch 2."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    model = HubertModel(HubertConfig(num_hidden_layers=3)).eval()
    state = model.state_dict()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = "encoder.pos_conv_embed.conv"
        state[f"{name}.{old}"] = state.pop(f"{name}.parametrizations.weight.{new}")
    torch.save(state, tmp_path / "pytorch_model.bin")
    own = {
        "model_type": "mert_model", "architectures": ["MERTModel"], "feature_extractor_cqt": False, "deepnorm": False,
        "auto_map": {"AutoConfig": "own--code.MERTConfig", "AutoModel": "own--code.MERTModel"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), **own}))
    Wav2Vec2FeatureExtractor(sampling_rate=24_000, do_normalize=True).save_pretrained(tmp_path)
    encoder = load_semantic_encoder(
        SemanticEncoderConfig(kind="mert", sample_rate=24_000, frame_rate=75, layer=2, weights=str(tmp_path))
    )
    x = noise(24_000, 2.0, 1)
    found = encoder.features(x)
    assert found.shape == (1, 150, 768)  # on the codec's clock: MERT alone gives 149
    normal = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        expected = model(torch.nn.functional.pad(normal, (40, 40)), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(found, expected, atol=1e-4)


def test_mert_that_needs_its_own_code(mert, tmp_path):
    for file in mert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "deepnorm": True}))
    with pytest.raises(UserError, match="deepnorm"):
        load_semantic_encoder(SemanticEncoderConfig(**MERT, weights=str(tmp_path)))


@pytest.mark.parametrize(("key", "value"), [("layer", 5), ("sample_rate", 24_000), ("frame_rate", 75)])
def test_mert_that_does_not_fit_the_recipe(mert, key, value):
    with pytest.raises(UserError, match=rf"encoders\.semantic\.{key}"):
        load_semantic_encoder(SemanticEncoderConfig(**{**MERT, "weights": str(mert), key: value}))


def test_clap_embeds_audio_and_text(clap):
    embedder = load_joint_embedder(clap, JointEmbedderConfig(**CLAP, weights=str(clap)))
    assert isinstance(embedder, JointEmbedder)
    for seconds in (2.0, 10.5):
        x = noise(48_000, seconds)
        audio = embedder.embed_audio(x)
        assert audio.shape == (2, 32)
        assert torch.allclose(audio.norm(dim=1), torch.ones(2), atol=1e-4)
        assert torch.equal(audio, embedder.embed_audio(x))  # longer waves are not cropped at random
    text = embedder.embed_text(["a flute", "many drums", "word " * 200])
    assert text.shape == (3, 32)
    assert torch.allclose(text.norm(dim=1), torch.ones(3), atol=1e-4)
    assert embedder.embed_text([]).shape == (0, 32)


def test_clap_sees_what_its_own_feature_extractor_makes(clap):
    from transformers import ClapFeatureExtractor

    embedder = load_joint_embedder(clap, JointEmbedderConfig(**CLAP, weights=str(clap)))
    extractor = ClapFeatureExtractor.from_pretrained(clap)
    for seconds in (10.0, 3.3):
        x = noise(48_000, seconds)
        quantised = (x * 32767).to(torch.int16).double() / 32767
        expected = extractor(list(quantised.numpy()), sampling_rate=48_000, return_tensors="pt")["input_features"]
        assert torch.allclose(embedder.spectrogram(x), expected.float(), atol=1e-3)


def test_long_clips_are_embedded_a_few_windows_at_a_time(clap, monkeypatch):
    config = JointEmbedderConfig(**{**CLAP, "window_seconds": 1.0, "hop_seconds": 0.5, "weights": str(clap)})
    embedder = load_joint_embedder(clap, config)
    x = noise(48_000, 3.0)
    whole = embed_windows(embedder, x, config)
    assert whole.shape == (2, 5, 32)
    assert torch.allclose(whole[1, 2], embedder.embed_audio(x[1:, 48_000:96_000])[0], atol=1e-5)
    monkeypatch.setattr(base, "WINDOWS", 3)
    assert torch.allclose(embed_windows(embedder, x, config), whole, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_same_in_fp32(clap, mert, dtype):
    exact = load_joint_embedder(clap, JointEmbedderConfig(**CLAP, weights=str(clap)))
    rough = load_joint_embedder(clap, JointEmbedderConfig(**CLAP, dtype=dtype, weights=str(clap)))
    x, texts = noise(48_000, 1.0), ["a flute", "many drums"]
    for one, other in (
        (exact.embed_audio(x), rough.embed_audio(x)),
        (exact.embed_text(texts), rough.embed_text(texts)),
    ):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert torch.cosine_similarity(one, other).min() > 0.99
        assert torch.allclose(other.norm(dim=1), torch.ones(2), atol=1e-4)
    exact, rough = (
        load_semantic_encoder(SemanticEncoderConfig(**MERT, dtype=name, weights=str(mert))) for name in ("fp32", dtype)
    )
    one, other = exact.features(noise(16_000, 1.0)), rough.features(noise(16_000, 1.0))
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, -1).mean() > 0.99


@pytest.mark.parametrize(("key", "value"), [("dim", 512), ("sample_rate", 44_100), ("window_seconds", 30.0)])
def test_clap_that_does_not_fit_the_recipe(clap, key, value):
    with pytest.raises(UserError, match=rf"encoders\.joint\.{key}"):
        load_joint_embedder(clap, JointEmbedderConfig(**{**CLAP, "weights": str(clap), key: value}))


def test_weights_of_another_model(encodec, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in encodec.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing"):
        load_codec(tmp_path, CodecConfig(**CODEC, weights=str(tmp_path)))


def test_no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download no-one/nothing"):
        load_codec(tmp_path, CodecConfig(**CODEC, weights="no-one/nothing"))
    with pytest.raises(UserError, match=r"needs config\.json"):
        load_codec(tmp_path, CodecConfig(**CODEC, weights=str(tmp_path)))


def test_a_folder_whose_weights_would_run_code(encodec, tmp_path):
    (tmp_path / "config.json").write_bytes((encodec / "config.json").read_bytes())
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="hold more than tensors, which is never loaded"):
        load_codec(tmp_path, CodecConfig(**CODEC, weights=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_fingerprint_follows_the_bytes_and_not_the_place(encodec, tmp_path):
    for file in encodec.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = CodecConfig(**CODEC, weights=str(tmp_path))
    before = encoder_fingerprint(config)
    assert before == encoder_fingerprint(config)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert encoder_fingerprint(config) != before
