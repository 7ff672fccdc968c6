"""EnCodec of the true architectures with random weights: the library's checkpoints and codes, stereo, long waves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_encoders import STEREO as SMALL_STEREO
from small_encoders import Evil, fill_codebooks, save_encodec

from model.config import CodecConfig
from model.encoders import chunks, encodec_waves, encoder_fingerprint, load_codec
from model.errors import UserError

MONO = {"kind": "encodec", "sample_rate": 24_000, "frame_rate": 75, "quantizers": 8, "codebook_size": 1024}
STEREO = {"kind": "encodec", "sample_rate": 48_000, "frame_rate": 150, "quantizers": 5, "codebook_size": 1024}
KBPS = 6.0


def music(rate: int, seconds: float, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(*shape, round(seconds * rate), generator=generator).cumsum(-1).sin()


def library_model(name: str):
    """The library's own model with random weights and, since it makes its codebooks as zeros, random codebooks."""
    from encodec import EncodecModel

    torch.manual_seed(0)
    model = getattr(EncodecModel, f"encodec_model_{name}")(pretrained=False).eval()
    model.set_target_bandwidth(KBPS)
    with torch.no_grad():
        left = model.encoder(music(model.sample_rate, 1.0, 1, model.channels))[0].T
        for layer in model.quantizer.vq.layers:
            embed = layer._codebook.embed
            embed.copy_(left[torch.randint(len(left), (len(embed),))] + 0.1 * left.std() * torch.randn(embed.shape))
            left = left - embed[torch.cdist(left, embed).argmin(1)]
    return model


@pytest.fixture(scope="module")
def mono(tmp_path_factory):
    model = library_model("24khz")
    path = tmp_path_factory.mktemp("mono") / "encodec_24khz-d7cc33bc.th"
    torch.save(model.state_dict(), path)
    return model, load_codec(path.parent, CodecConfig(**MONO, weights=str(path))), path


@pytest.fixture(scope="module")
def stereo(tmp_path_factory):
    model = library_model("48khz")
    path = tmp_path_factory.mktemp("stereo") / "encodec_48khz-7e698e3e.th"
    torch.save(model.state_dict(), path)
    return model, load_codec(path.parent, CodecConfig(**STEREO, weights=str(path))), path


def test_mono_codes_and_wave_are_the_librarys(mono):
    model, codec, _ = mono
    wave = music(24_000, 1.0, 2)
    with torch.no_grad():
        expected = model.encode(wave[:, None])
        heard = model.decode(expected)[:, 0]
    codes = codec.encode(wave)
    assert codec.channels == 1
    assert torch.equal(codes, expected[0][0].transpose(1, 2))
    assert all(len(codes[..., level].unique()) > 10 for level in range(8))
    assert torch.allclose(codec.decode(codes), heard, atol=1e-5)


def test_a_folder_of_transformers_gives_the_same_codes(mono, tmp_path):
    _, codec, _ = mono
    codec.model.save_pretrained(tmp_path)
    wave = music(24_000, 0.5, 1)
    assert torch.equal(
        load_codec(tmp_path, CodecConfig(**MONO, weights=str(tmp_path))).encode(wave), codec.encode(wave)
    )


def test_long_waves_are_done_in_chunks_that_do_not_show(mono, monkeypatch):
    _, codec, _ = mono
    wave = music(24_000, 5.5, 1)
    whole = codec.encode(wave)
    heard = codec.decode(whole)
    monkeypatch.setattr(encodec_waves, "CHUNK_SECONDS", 2.5)
    # Of so few random codes two may be as near as each other, and rounding decides.
    assert (codec.encode(wave) == whole).float().mean() >= 0.98
    assert (codec.decode(whole) - heard).abs().max() <= 1e-3 * heard.abs().max()
    monkeypatch.setattr(encodec_waves, "CONTEXT_SECONDS", 0.0)
    assert (codec.encode(wave) == whole).float().mean() < 0.99  # the context is what makes them equal


def test_a_model_that_looks_ahead_gets_context_on_both_sides(tmp_path, monkeypatch):
    """MusicGen's of 32 kHz, at small size."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(
        EncodecConfig(
            sampling_rate=32_000, upsampling_ratios=[8, 5, 4, 4], use_causal_conv=False, num_filters=4, hidden_size=16,
            codebook_size=64, target_bandwidths=[0.6], num_lstm_layers=1,
        )
    )  # fmt: skip
    fill_codebooks(model)
    model.save_pretrained(tmp_path)
    config = {"kind": "encodec", "sample_rate": 32_000, "frame_rate": 50, "quantizers": 2, "codebook_size": 64}
    codec = load_codec(tmp_path, CodecConfig(**config, weights=str(tmp_path)))
    wave = music(32_000, 6.0, 1)
    whole = codec.encode(wave)
    heard = codec.decode(whole)
    assert whole.shape == (1, 300, 2)
    assert len(whole.unique()) > 5
    monkeypatch.setattr(encodec_waves, "CHUNK_SECONDS", 2.5)
    # Of so few random codes two may be as near as each other, and rounding decides.
    assert (codec.encode(wave) == whole).float().mean() >= 0.98
    assert (codec.decode(whole) - heard).abs().max() <= 1e-3 * heard.abs().max()


def test_memory_does_not_grow_with_the_length_of_a_wave(mono, monkeypatch):
    """The longest piece that the model gets."""
    _, codec, _ = mono
    monkeypatch.setattr(encodec_waves, "CHUNK_SECONDS", 1.0)
    monkeypatch.setattr(encodec_waves, "CONTEXT_SECONDS", 0.5)
    monkeypatch.setattr(chunks, "BATCH_SECONDS", 3.0)
    sizes = []
    encode = codec.model.encode
    monkeypatch.setattr(codec.model, "encode", lambda wave, **more: sizes.append(wave.numel()) or encode(wave, **more))
    assert codec.encode(music(24_000, 2.5, 3)).shape == (3, 187, 8)
    assert max(sizes) <= 3.0 * 24_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The stereo codec at small size."""
    folder = save_encodec(tmp_path_factory.mktemp("small"), stereo=True)
    return load_codec(folder, CodecConfig(**SMALL_STEREO, weights=str(folder)))


def test_stereo_codes_are_the_librarys_and_its_loudness_comes_first(stereo):
    model, codec, _ = stereo
    wave = music(48_000, 1.0, 1, 2)
    with torch.no_grad():
        (expected, scale), *_ = model.encode(wave)
    codes = codec.encode(wave)
    assert codec.channels == 2
    assert torch.equal(codes[..., 1:], expected.transpose(1, 2))
    loudness = encodec_waves.LEVEL_FLOOR_DB + encodec_waves.LEVEL_STEP_DB * codes[:, :, 0]
    assert (loudness - 20 * scale.log10()).abs().max() <= encodec_waves.LEVEL_STEP_DB / 2 + 1e-3


@pytest.mark.parametrize("seconds", [0.1, 1.0, 1.001, 1.99, 2.5])
def test_stereo_runs_at_150_frames_a_second(small, seconds):
    frames = int(seconds * 150)
    codes = small.encode(music(48_000, seconds, 1, 2))
    assert codes.shape == (1, frames, 3)
    assert small.decode(codes).shape == (1, 2, frames * 320)
    assert small.decode(codes).isfinite().all()


def test_stereo_keeps_how_loud_each_second_is_wherever_codes_are_cut(small):
    """And silence stays silence, though the model makes the same noise of all that is as quiet as it can be."""
    wave = music(48_000, 6.0, 1, 2)
    wave[..., 2 * 48_000 :] *= 0.05
    wave[..., 4 * 48_000 :] = 0
    codes = small.encode(wave)
    loud, quiet, silent = (levels(small.decode(codes))[second] for second in (1, 3, 5))
    assert loud - quiet == pytest.approx(26.0, abs=1.5)  # 20 × log10(20)
    assert loud - silent > 70
    cut = levels(small.decode(codes[:, 150:]))  # segments now begin elsewhere
    assert cut[0] - cut[2] == pytest.approx(26.0, abs=1.5)
    assert cut[0] == pytest.approx(loud, abs=1.0)


def levels(wave: torch.Tensor) -> list[float]:
    """dB of the middle of each second."""
    middles = wave.unfold(-1, 48_000, 48_000)[..., 12_000:36_000]
    return (10 * middles.square().mean((0, 1, 3)).clamp_min(1e-12).log10()).tolist()


def test_the_first_codebooks_alone_can_be_heard(small):
    codes = small.encode(music(48_000, 0.5, 1, 2))
    assert small.decode(codes[..., :2]).abs().max() > 0.01
    assert small.decode(codes[..., :1]).shape == (1, 2, 24_000)


def test_recipe_and_file_that_do_not_fit(mono, stereo):
    with pytest.raises(UserError, match=r"encoders\.codec\.sample_rate is 24000, but .* 48000"):
        load_codec(Path(), CodecConfig(**MONO, weights=str(stereo[2])))
    with pytest.raises(UserError, match=r"quantizers is 8: .* 3, 5, 9, 17 \(the first is the loudness\)"):
        load_codec(Path(), CodecConfig(**{**STEREO, "quantizers": 8}, weights=str(stereo[2])))


def test_what_to_fetch_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no file .*\n.*dl\.fbaipublicfiles\.com/encodec"):
        load_codec(tmp_path, CodecConfig(**MONO, weights=str(tmp_path / "encodec_24khz-d7cc33bc.th")))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download facebook/encodec_48khz"):
        load_codec(tmp_path, CodecConfig(**STEREO))


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path):
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "evil.th")
    with pytest.raises(UserError, match="could run code: it was not loaded"):
        load_codec(tmp_path, CodecConfig(**MONO, weights=str(tmp_path / "evil.th")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("old", [False, True])
def test_files_that_are_damaged_or_of_something_else(mono, tmp_path, old):
    _, _, path = mono
    state = torch.load(path, weights_only=True)
    file = tmp_path / "weights.th"
    config = CodecConfig(**MONO, weights=str(file))
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    assert load_codec(tmp_path, config).encode(music(24_000, 0.1, 1)).shape == (1, 7, 8)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"damaged|could run code|no checkpoint"):
        load_codec(tmp_path, config)
    state.pop("decoder.model.0.conv.conv.bias")
    torch.save(state, file)
    with pytest.raises(UserError, match=r"1 of 252 tensors are missing .* decoder\.layers\.0\.conv\.bias"):
        load_codec(tmp_path, config)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="no state dict"):
        load_codec(tmp_path, config)
    file.write_text("an error page")
    with pytest.raises(UserError, match="no checkpoint"):
        load_codec(tmp_path, config)


def test_fingerprint_is_of_the_files_bytes(mono, tmp_path):
    _, _, path = mono
    copy = tmp_path / "copy.th"
    copy.write_bytes(path.read_bytes())
    before = encoder_fingerprint(CodecConfig(**MONO, weights=str(copy)))
    assert before == encoder_fingerprint(CodecConfig(**MONO, weights=str(path)))
    copy.write_bytes(b"other")
    assert encoder_fingerprint(CodecConfig(**MONO, weights=str(copy))) != before
