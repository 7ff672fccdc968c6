"""The look at the encoders before a run: what is broken is named, what is rough passes."""

from __future__ import annotations

import pytest
import torch
from small_encoders import CLAP, CODEC, MERT, STEREO, save_clap, save_encodec, save_mert
from torch import Tensor

from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig
from model.encoders import check, load_codec, load_joint_embedder, load_semantic_encoder
from model.encoders.chroma import MelChroma
from model.encoders.mel import MelCodec
from model.encoders.towers import TwoTowers, fit_tokenizer
from model.errors import UserError


class Rounded:
    """A working codec, if a rough one: a sample's code is which of 15 steps it is near, 4 samples a frame."""

    fitted, channels, sample_rate = False, 1, 16_000

    def encode(self, wave: Tensor) -> Tensor:
        return ((wave + 1) * 7).round().long().unflatten(1, (-1, 4))

    def decode(self, codes: Tensor) -> Tensor:
        return codes.flatten(1) / 7 - 1


class InStereo(Rounded):
    channels = 2

    def encode(self, wave: Tensor) -> Tensor:
        assert wave.shape[1] == 2
        return super().encode(wave[:, 0])

    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes)[:, None].expand(-1, 2, -1)


class Silent(Rounded):
    def decode(self, codes: Tensor) -> Tensor:
        return 1e-3 * super().decode(codes)


class NotANumber(Rounded):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes) / 0


class Noise(Rounded):
    def decode(self, codes: Tensor) -> Tensor:
        return torch.randn(super().decode(codes).shape, generator=torch.Generator().manual_seed(0))


class OctaveDown(Rounded):
    """As weights for another sample rate sound."""

    def decode(self, codes: Tensor) -> Tensor:
        wave = super().decode(codes)
        return wave.repeat_interleave(2, 1)[:, : wave.shape[1]]


class OneCode(Rounded):
    def encode(self, wave: Tensor) -> Tensor:
        return torch.zeros_like(super().encode(wave))


@pytest.mark.parametrize("codec", [Rounded, InStereo])
def test_a_rough_codec_passes(codec):
    check.check_codec(codec())


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (Silent, "decodes a tone to silence"),
        (NotANumber, "finite"),
        (Noise, "does not keep a tone of 330 Hz"),
        (OctaveDown, "does not keep a tone of 330 Hz"),
        (OneCode, "the same codes"),
    ],
)
def test_a_broken_codec_is_named(codec, words):
    with pytest.raises(UserError, match=rf"encoders\.codec: .*{words}"):
        check.check_codec(codec())


@pytest.mark.parametrize("stereo", [False, True])
def test_an_untrained_encodec_is_broken(tmp_path, stereo):
    save_encodec(tmp_path, stereo)
    codec = load_codec(tmp_path, CodecConfig(**(STEREO if stereo else CODEC), weights=str(tmp_path)))
    with pytest.raises(UserError, match=r"encoders\.codec"):
        check.check_codec(codec)


@pytest.mark.parametrize("quantizers", [1, 4])
def test_a_codec_fitted_on_drums_may_not_know_tones(quantizers):
    codec = MelCodec(CodecConfig(quantizers=quantizers, codebook_size=16))
    strokes = torch.randn(4, 16_000, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0, 4_000).repeat(4)
    codec.quantizer.fit([codec.vectors(strokes).flatten(0, 1), codec.silence.expand(4, -1)])
    check.check_codec(codec)
    codec.quantizer.centroids.zero_()
    with pytest.raises(UserError, match="the same codes"):
        check.check_codec(codec)


def test_built_in_encoders_pass_whatever_words_mean_to_them(monkeypatch):
    codec = MelCodec(CodecConfig(quantizers=2, codebook_size=16))
    codec.quantizer.fit([codec.vectors(torch.randn(2, 16_000)).flatten(0, 1), codec.silence.expand(4, -1)])
    torch.manual_seed(0)
    towers = TwoTowers(JointEmbedderConfig(dim=16, width=64), fit_tokenizer([], 64)).eval()  # trained without captions
    monkeypatch.setattr(towers, "embed_text", lambda texts: torch.ones(len(texts), 16) / 4)
    check.check_encoders(codec, MelChroma(SemanticEncoderConfig()), towers)


def test_semantic_features_that_say_nothing(tmp_path):
    save_mert(tmp_path)
    encoder = load_semantic_encoder(SemanticEncoderConfig(**MERT, weights=str(tmp_path)))
    check.check_semantic(encoder)
    encoder.model.encoder.layers[-1].final_layer_norm.weight.data.zero_()
    encoder.model.encoder.layers[-1].final_layer_norm.bias.data.fill_(1)
    with pytest.raises(UserError, match=r"encoders\.semantic: .* the same features"):
        check.check_semantic(encoder)
    encoder.model.encoder.layers[-1].final_layer_norm.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"encoders\.semantic: .* not finite"):
        check.check_semantic(encoder)


def test_a_collapsed_text_tower(tmp_path):
    save_clap(tmp_path)
    embedder = load_joint_embedder(tmp_path, JointEmbedderConfig(**CLAP, weights=str(tmp_path)))
    check.check_joint(embedder)
    embedder.model.text_projection.linear2.weight.data.mul_(1e-3)
    embedder.model.text_projection.linear2.bias.data.fill_(1)
    with pytest.raises(
        UserError, match=r"encoders\.joint: .* unrelated texts for alike \(mean cosine (0.99\d|1.000)\)"
    ):
        check.check_joint(embedder)


def test_an_audio_tower_that_hears_nothing(tmp_path):
    save_clap(tmp_path)
    embedder = load_joint_embedder(tmp_path, JointEmbedderConfig(**CLAP, weights=str(tmp_path)))
    embedder.model.audio_projection.linear2.weight.data.zero_()
    embedder.model.audio_projection.linear2.bias.data.fill_(1)
    with pytest.raises(UserError, match=r"encoders\.joint: .* the same embedding"):
        check.check_joint(embedder)
