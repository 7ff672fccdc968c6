"""`stretto generate`: its options reach the bundle, and each bad one is a line."""

from __future__ import annotations

import sys

import pytest
import soundfile
import torch
from small_bundle import PROMPTS, make_bundle

from launcher import cli
from launcher.generate import read_options


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def generate(monkeypatch, capfd):
    """Runs the command in this process: exit code, standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stretto", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, capfd.readouterr().err

    return call


@pytest.fixture
def music(generate, bundle, tmp_path):
    """Makes one piece and returns its wave."""

    def make(*arguments: object, prompt: str = PROMPTS[0]):
        code, error = generate(bundle, prompt, "--seconds", "0.2", "-o", tmp_path / "a.wav", *arguments)
        assert code == 0, error
        return soundfile.read(tmp_path / "a.wav")[0].tolist()

    return make


def test_a_value_of_one_stage_reaches_that_stage_alone(music):
    drawn, likeliest = music(), music("--temperature", "0")
    only_fine = music("--temperature", "fine=0")
    assert len({tuple(made) for made in (drawn, likeliest, only_fine)}) == 3
    assert music("--top-p", "fine=1e-9") == music("--top-k", " fine = 1 ") == only_fine
    assert music("--top-k", "semantic=1,coarse=1,fine=1") == music("--top-p", "1e-9") == likeliest
    assert music("--cfg", "coarse=3") != drawn


def test_a_stereo_codec_makes_stereo_files(generate, bundle, tmp_path, monkeypatch):
    from model import pipeline
    from model.encoders.mel import MelCodec

    class Stereo(MelCodec):
        channels = 2

        def decode(self, codes):
            wave = super().decode(codes)
            return torch.stack([wave, -wave], 1)

    monkeypatch.setattr(pipeline, "load_codec", Stereo.load)
    code, error = generate(bundle, PROMPTS[0], "--seconds", "0.2", "--samples", "2", "-o", tmp_path / "a.wav")
    assert code == 0, error
    for number in (1, 2):
        wave, rate = soundfile.read(tmp_path / f"a-{number}.wav")
        assert wave.shape == (0.2 * rate, 2)
        assert wave[:, 0] == pytest.approx(-wave[:, 1], abs=1e-4)


def test_what_is_not_given_is_left_to_the_bundle():
    by_stage = {"temperature": "semantic=0.8, coarse=.5", "top_k": "40", "top_p": None}
    read = read_options(by_stage, seed=3, seconds=None)
    assert read.model_dump(exclude_unset=True) == {
        "temperature": {"semantic": 0.8, "coarse": 0.5},
        "top_k": {"semantic": 40, "coarse": 40, "fine": 40},
        "seed": 3,
    }


def test_samples_are_made_prompt_by_prompt(generate, bundle, music, tmp_path):
    out = tmp_path / "many.wav"
    assert generate(bundle, *PROMPTS, "--samples", 2, "--seed", 5, "--seconds", 0.2, "-o", out)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("many*")) == [f"many-{number}.wav" for number in (1, 2, 3, 4)]
    for number, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
        made = soundfile.read(tmp_path / f"many-{number + 1}.wav")[0].tolist()
        assert made == pytest.approx(music("--seed", 5 + number, prompt=prompt), abs=1e-3)


def test_a_recording_gives_samples_too(generate, bundle, music, tmp_path):
    music()
    arguments = ["--like", tmp_path / "a.wav", "--samples", 2, "--seconds", 0.2]
    assert generate(bundle, *arguments, "-o", tmp_path / "like.wav")[0] == 0
    assert (tmp_path / "like-1.wav").read_bytes() != (tmp_path / "like-2.wav").read_bytes()


def test_the_weights_can_be_in_bf16(music):
    made = music("--dtype", "bf16", "--device", "cpu")
    assert len(made) == 3200
    assert max(map(abs, made)) > 0.01


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--temperature", "-1"], "--temperature is '-1': it must be a number that is 0 or more."),
        (["--temperature", "hot"], "--temperature is 'hot': it must be a number that is 0 or more."),
        (["--temperature", "nan"], "--temperature is 'nan': it must be a number that is 0 or more."),
        (["--temperature", "fine="], "--temperature of fine is '': it must be a number that is 0 or more."),
        (
            ["--temperature", "0.9,fine=1"],
            "--temperature is '0.9,fine=1': give one number, or STAGE=NUMBER for each stage and commas.",
        ),
        (["--temperature", "fine=1,fine=2"], "--temperature is 'fine=1,fine=2': it names fine twice."),
        (
            ["--temperature", "semantik=1"],
            "--temperature: there is no stage 'semantik'. Did you mean semantic? Choose semantic, coarse, fine.",
        ),
        (["--top-k", "0"], "--top-k is '0': it must be a whole number that is 1 or more."),
        (["--top-k", "coarse=2.5"], "--top-k of coarse is '2.5': it must be a whole number that is 1 or more."),
        (["--top-p", "0"], "--top-p is '0': it must be a number that is more than 0 and at most 1."),
        (["--top-p", "fine=1.5"], "--top-p of fine is '1.5': it must be a number that is more than 0 and at most 1."),
        (["--cfg", "-0.5"], "--cfg is '-0.5': it must be a number that is 0 or more."),
        (["--seconds", "0"], "--seconds is 0.0: it must be a number that is more than 0."),
        (["--seconds", "inf"], "--seconds is inf: it must be a number that is more than 0."),
        (["--samples", "0"], "--samples is 0: it must be a whole number that is 1 or more."),
        (["--seed", "-1"], "--seed is -1: it must be a whole number that is 0 or more and less than 2^62."),
        (["--overlap", "1"], "--overlap is 1.0: it must be a number that is 0 or more and less than 1."),
        (["--device", "tpu"], "device is 'tpu': it must be cpu or cuda."),
        (
            ["--device", "cuda:99"],
            f"device is 'cuda:99': torch finds {torch.cuda.device_count()} GPUs here. Choose cpu.",
        ),
        (["--weights", "codec"], "--weights is 'codec': give codec=PLACE or joint=PLACE."),
        (["--dtype", "fp8"], "dtype is 'fp8': it must be auto, fp32, bf16, fp16."),
    ],
)
def test_a_bad_value_is_one_line_before_anything_is_loaded(generate, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert generate("nowhere", "a flute", *arguments) == (2, f"error: {line}\n")
    assert list(tmp_path.iterdir()) == []
