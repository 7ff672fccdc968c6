"""The built-in encoders: one clock, and features that say what they should."""

from __future__ import annotations

import pytest
import torch

from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig
from model.encoders import (
    CODECS,
    JOINT_EMBEDDERS,
    SEMANTIC_ENCODERS,
    encoder_class,
    load_codec,
    load_joint_embedder,
    spectrum,
)
from model.encoders.base import Codec, JointEmbedder, SemanticEncoder
from model.encoders.chroma import MelChroma
from model.encoders.mel import MelCodec
from model.encoders.spectrum import stft_frames
from model.encoders.towers import MEL_HZ, TwoTowers, fit_tokenizer, rhythm
from model.errors import UserError

RATE = 16_000
CAPTIONS = ["a slow flute without drums", "a fast brass horn with drums", "a low bell"]


def tone(hz: float, seconds: float = 1.0, level: float = 0.3) -> torch.Tensor:
    return level * torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * RATE)) / RATE)[None]


def clicks(period: float, seconds: float = 4.0, shift: float = 0.0) -> torch.Tensor:
    """Short noises every `period` seconds, the first at `shift`."""
    wave = torch.zeros(1, round(seconds * RATE))
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 0, 400)
    for number in range(int((seconds - shift - 0.05) / period) + 1):
        start = round((shift + number * period) * RATE)
        wave[0, start : start + 400] += noise
    return wave


def small_codec(**changes) -> MelCodec:
    codec = MelCodec(CodecConfig(**{"quantizers": 3, "codebook_size": 32, **changes}))
    waves = torch.cat([tone(hz, 2.0) for hz in (110, 220, 440, 880)])
    codec.quantizer.fit([codec.vectors(waves).flatten(0, 1), codec.silence.expand(4, -1)])
    return codec


def small_towers(**changes) -> TwoTowers:
    torch.manual_seed(0)
    config = JointEmbedderConfig(**{"dim": 16, "width": 64, **changes})
    return TwoTowers(config, fit_tokenizer(CAPTIONS, 128)).eval()


@pytest.mark.parametrize("table", [CODECS, SEMANTIC_ENCODERS, JOINT_EMBEDDERS])
def test_every_kind_in_the_tables_exists(table):
    for kind in table:
        assert encoder_class(table, kind).__name__ in table[kind]


def test_encoders_meet_the_interfaces():
    assert isinstance(small_codec(), Codec)
    assert isinstance(MelChroma(SemanticEncoderConfig()), SemanticEncoder)
    assert isinstance(small_towers(), JointEmbedder)


def test_frames_are_centred_on_their_interval():
    # An impulse in the middle of [t × hop, (t + 1) × hop) is strongest in frame t.
    wave = torch.zeros(1, 20 * 320)
    wave[0, 7 * 320 + 160] = 1.0
    energy = stft_frames(wave, torch.hann_window(1024), 320).abs().square().sum(-1)[0]
    assert energy.argmax() == 7
    assert energy[6] == pytest.approx(float(energy[8]), rel=1e-3)


@pytest.mark.parametrize("frame_rate", [25, 50])
def test_codec_frames_and_samples(frame_rate):
    codec = small_codec(frame_rate=frame_rate)
    codes = codec.encode(tone(220, 1.03))
    assert codes.shape == (1, int(1.03 * frame_rate), 3)
    assert codec.decode(codes).shape == (1, codes.shape[1] * RATE // frame_rate)
    assert codec.encode(torch.zeros(2, 10)).shape == (2, 0, 3)


def test_codec_keeps_the_pitch_and_the_silence():
    codec = small_codec()
    for hz in (220, 880):
        wave = codec.decode(codec.encode(tone(hz)))
        assert abs(int(torch.fft.rfft(wave[0]).abs().argmax()) * RATE / wave.shape[1] - hz) < 20
        assert wave.square().mean().sqrt() == pytest.approx(0.3 / 2**0.5, rel=0.3)
    assert codec.decode(codec.encode(torch.zeros(1, RATE))).abs().max() < 0.01


def test_codec_saved_and_loaded(tmp_path):
    codec = small_codec()
    codec.save(tmp_path)
    loaded = load_codec(tmp_path, CodecConfig(quantizers=3, codebook_size=32))
    assert torch.equal(loaded.encode(tone(300)), codec.encode(tone(300)))


def test_frame_rate_that_does_not_divide_is_a_users_mistake():
    with pytest.raises(UserError, match=r"encoders\.codec\.frame_rate"):
        MelCodec(CodecConfig(frame_rate=30, sample_rate=16_001))
    with pytest.raises(UserError, match=r"encoders\.semantic\.frame_rate"):
        MelChroma(SemanticEncoderConfig(frame_rate=75))


def test_long_waves_are_analysed_a_block_at_a_time_with_the_same_result(monkeypatch):
    wave = torch.cat([tone(330, 1.5), clicks(0.3, 1.5)])
    codec, chroma, towers = small_codec(), MelChroma(SemanticEncoderConfig()), small_towers()
    whole = [codec.vectors(wave), chroma.features(wave), towers.features(wave)]
    monkeypatch.setattr(spectrum, "BLOCK_FRAMES", 7)
    for one, other in zip(whole, [codec.vectors(wave), chroma.features(wave), towers.features(wave)], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_semantic_features_tell_notes_and_ignore_octaves_in_chroma():
    encoder = MelChroma(SemanticEncoderConfig())
    features = [encoder.features(tone(hz))[0, 12] for hz in (220, 440, 311.13)]
    assert encoder.features(tone(220, 1.03)).shape == (1, 25, encoder.dim)
    chroma = torch.stack(features)[:, -12:]
    assert chroma[0].argmax() == chroma[1].argmax() == 9  # A
    assert chroma[2].argmax() == 3  # E flat
    assert (features[0] - features[1]).norm() > 1  # the spectrum still differs


def test_rhythm_shows_the_period_wherever_the_first_beat_is():
    towers = small_towers()
    for period in (0.4, 0.56, 0.8):
        for shift in (0.0, 0.14):
            shown = rhythm(towers.features(clicks(period, shift=shift))).view(4, -1).mean(0)
            lags = torch.arange(1, len(shown) + 1) / MEL_HZ
            assert float(lags[10 + shown[10:45].argmax()]) == pytest.approx(period, abs=0.025)


def test_towers_give_unit_vectors_for_any_length_and_level():
    towers = small_towers()
    for seconds in (0.5, 2.0, 7.0):
        wave = torch.cat([tone(220, seconds), tone(330, seconds)])
        found = towers.embed_audio(wave)
        assert found.shape == (2, 16)
        assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
    loud, soft = towers.embed_audio(clicks(0.5) * 0.9), towers.embed_audio(clicks(0.5) * 0.6)
    assert float((loud * soft).sum()) > 0.99


def test_towers_text():
    towers = small_towers()
    found = towers.embed_text([*CAPTIONS, "", "☃ ?!", "word " * 1000])
    assert found.shape == (6, 16)
    assert torch.allclose(found.norm(dim=1), torch.ones(6), atol=1e-5)
    # Neither case, accents nor the other texts of a batch change a text's vector.
    assert torch.allclose(towers.embed_text(["A Slow Flûte without DRUMS"])[0], found[0], atol=1e-5)
    assert towers.embed_text([]).shape == (0, 16)


def test_towers_without_captions_still_take_text():
    torch.manual_seed(0)
    towers = TwoTowers(JointEmbedderConfig(dim=16, width=64), fit_tokenizer([], 128)).eval()
    assert towers.embed_text(["anything", "else"]).isfinite().all()


def test_towers_saved_and_loaded(tmp_path):
    towers = small_towers()
    towers.save(tmp_path)
    loaded = load_joint_embedder(tmp_path, JointEmbedderConfig(dim=16, width=64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint.safetensors", "tokenizer.json"]
    assert torch.allclose(loaded.embed_audio(tone(220)), towers.embed_audio(tone(220)), atol=1e-6)
    assert torch.allclose(loaded.embed_text(CAPTIONS), towers.embed_text(CAPTIONS), atol=1e-6)
