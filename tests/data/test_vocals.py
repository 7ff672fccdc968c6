"""Vocals taken out by Demucs: tiny models of its true class, in every form in which its weights come."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from demucs.htdemucs import HTDemucs
from ranks import run_ranks
from safetensors.torch import save_file
from tokenising import contents, job, make_corpus

from data.steps import demucs_weights, load_steps, steps_digests
from data.steps.config import VocalsConfig
from data.steps.vocals import Vocals
from launcher.recipe import load_recipe
from model.errors import UserError

SOURCES = ["drums", "bass", "other", "vocals"]
SETTINGS = {"channels": 8, "t_layers": 1, "t_heads": 2, "segment": Fraction(1, 2)}
KINDS = [(44_100, 2), (16_000, 1), (48_000, 2)]


@pytest.fixture(autouse=True)
def one_thread():
    """As the tokeniser has it; small convolutions by several threads of a busy machine take forty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """Whatever Demucs has fetched on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def tiny(loud: tuple[str, ...] = tuple(SOURCES), seed: int = 0) -> HTDemucs:
    """A model that hears nothing but the sources `loud`."""
    torch.manual_seed(seed)
    model = HTDemucs(SOURCES, **SETTINGS).eval()
    for last in (model.decoder[-1].conv_tr, model.tdecoder[-1].conv_tr):
        each = last.bias.shape[0] // len(SOURCES)
        for number, name in enumerate(SOURCES):
            own = slice(number * each, (number + 1) * each)
            last.weight.data[:, own] *= 10 * (name in loud)  # random weights alone give next to nothing
            last.bias.data[own] *= name in loud
    return model


def save_pickle(model: HTDemucs, path: Path, **changes: Any) -> Path:
    """As Demucs itself writes a model."""
    package = {
        "klass": HTDemucs,
        "args": (SOURCES,),
        "kwargs": {**SETTINGS, "a_key_of_an_older_version": 1},
        "state": {name: value.half() for name, value in model.state_dict().items()},
        "training_args": {"epochs": 360, "best": np.float64(9.1), "seed": np.int64(42)},
    }
    torch.save({**package, **changes}, path)
    return path


def save_safetensors(model: HTDemucs, path: Path, **changes: str) -> Path:
    """As its models lie on the Hugging Face hub."""
    segment = {"_type": "fraction", "numerator": 1, "denominator": 2}
    said = {
        "klass": "demucs.htdemucs.HTDemucs",
        "args": json.dumps([SOURCES]),
        "kwargs": json.dumps({**SETTINGS, "segment": segment}),
    }
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, {**said, **changes})
    return path


def music(clips: int = 2) -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(rate: int, channels: int) -> torch.Tensor:
        shape = (clips, channels, rate) if channels == 2 else (clips, rate)
        return 0.2 * torch.rand(shape, generator=generator) - 0.1

    return {kind: noise(*kind) for kind in KINDS}


def test_the_number_of_ranks_changes_no_byte(tmp_path):
    corpus = make_corpus(tmp_path / "made", 6)
    steps = [{"kind": "vocals", "weights": str(save_pickle(tiny(), tmp_path / "mine.th"))}]
    for path, ranks, settings in (("one", 1, {"steps": steps}), ("two", 2, {"steps": steps}), ("plain", 1, {})):
        run_ranks(job, ranks, tmp_path / f"log-{path}", corpus, tmp_path / path, settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    plain = contents(tmp_path / "plain")
    assert all(contents(tmp_path / "one")[name] != plain[name] for name in plain if name.endswith(".mds"))


def test_what_the_model_calls_vocals_is_gone(tmp_path):
    mix = music()
    loudness = {}
    for name in SOURCES:
        step = Vocals("mine", str(save_pickle(tiny((name,)), tmp_path / f"{name}.th")))
        assert step.kinds == [(44_100, 2)]
        heard = step.audio(mix)
        assert {kind: wave.shape for kind, wave in heard.items()} == {kind: wave.shape for kind, wave in mix.items()}
        loudness[name] = [float(heard[kind].std(-1).mean()) for kind in KINDS]
        assert {wave.dtype for wave in heard.values()} == {torch.float32}
    assert all(min(loudness[name]) > 5 * max(loudness["vocals"]) for name in SOURCES[:3]), loudness


def test_all_that_hear_a_clip_hear_the_same(tmp_path):
    """Resampled from one separation, whatever the clip was read as."""
    step = Vocals("mine", str(save_pickle(tiny(), tmp_path / "mine.th")))
    heard = step.audio(music())
    expected = step.without_vocals(music()[44_100, 2][1])
    torch.testing.assert_close(heard[44_100, 2][1], expected.clip(-1, 1))
    spectra = [np.abs(np.fft.rfft(heard[kind][1].reshape(-1, kind[0]).mean(0)))[:7000] / kind[0] for kind in KINDS]
    for spectrum in spectra[1:]:
        # But for the ends, where a resampler hears silence beyond.
        assert np.linalg.norm(spectrum - spectra[0]) < 0.02 * np.linalg.norm(spectra[0])


def test_silence_stays_silent_and_the_other_clips_do_not_matter(tmp_path):
    step = Vocals("mine", str(save_pickle(tiny(), tmp_path / "mine.th")))
    mix = music()
    alone = step.audio({kind: wave[1:] for kind, wave in mix.items()})
    mix[44_100, 2][0] = 0
    heard = step.audio(mix)
    for kind in KINDS:
        assert heard[kind][0].abs().max() < 1e-6
        torch.testing.assert_close(heard[kind][1], alone[kind][0], rtol=0, atol=0)


def test_every_form_of_the_weights_gives_the_same_model(tmp_path):
    one = save_pickle(tiny(), tmp_path / "one.th")
    expected = Vocals("mine", str(one)).audio(music())
    folder, bag = tmp_path / "folder", tmp_path / "bag"
    for place in (folder, bag):
        place.mkdir()
    save_safetensors(tiny(), folder / "955717e8.safetensors")  # which the package lists as htdemucs
    (bag / "mine.yaml").write_text("models: ['aaaa', 'bbbb']\nweights: [[1, 1, 1, 1], [0, 0, 0, 0]]\n")
    save_pickle(tiny(), bag / "aaaa-01234567.th")
    save_pickle(tiny(seed=1), bag / "bbbb.th")
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_pickle(tiny(), cache / "955717e8-8726e21a.th")
    hub = tmp_path / "hub" / "models--adefossez--HTDemucs-none"
    (hub / "snapshots" / "0123").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123")
    (hub / "snapshots" / "0123" / "htdemucs_none.yaml").write_text("models: ['cccc']\n")
    save_safetensors(tiny(), hub / "snapshots" / "0123" / "cccc.safetensors")
    forms = (("htdemucs", str(folder)), ("mine", str(bag)), ("htdemucs", None), ("htdemucs_none", None))
    for model, weights in forms:
        heard = Vocals(model, weights).audio(music())
        torch.testing.assert_close(heard, expected)


def test_the_weights_tell_tokens_apart_and_their_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pickle(tiny(), tmp_path / "mine.th")
    recipe = load_recipe("quickstart", ["tokens.steps=[{kind: vocals, weights: mine.th}]"])
    step = recipe.tokens.steps[0]
    assert isinstance(step, VocalsConfig)
    assert step.weights == str(tmp_path / "mine.th")
    digests = steps_digests(recipe.tokens.steps)
    save_pickle(tiny(seed=1), tmp_path / "mine.th")
    assert digests.keys() == steps_digests(recipe.tokens.steps).keys() == {"the weights of tokens.steps.0"}
    assert digests != steps_digests(recipe.tokens.steps)


class Opens:
    """What a hostile file would run when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_nothing_in_a_pickle_is_run(tmp_path, form):
    path, made = tmp_path / "bad.th", tmp_path / "made"
    if form == "torch":
        save_pickle(tiny(), path, training_args=Opens(made))
    else:
        path.write_bytes(pickle.dumps({"klass": Opens(made)}))
    with pytest.raises(UserError, match=r"bad\.th does not read as weights of Demucs; nothing in it was run"):
        Vocals("mine", str(path))
    assert not made.exists()


def test_a_file_that_is_no_model_of_demucs_is_refused(tmp_path):
    path, deaf = tmp_path / "bad.th", HTDemucs(["drums", "other"], **SETTINGS)
    for changes, words in (
        ({"state": {"__quantized": True}}, "compressed with diffq: take a model without _q in its name"),
        ({"klass": dict}, "does not read as weights of Demucs"),
        ({"kwargs": {**SETTINGS, "channels": 16}}, "do not fit their model"),
        ({"args": (deaf.sources,), "state": deaf.state_dict()}, "none that tells vocals in stereo from other sources"),
    ):
        save_pickle(tiny(), path, **changes)
        with pytest.raises(UserError, match=words):
            Vocals("mine", str(path))
    whole = save_safetensors(tiny(), tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.safetensors does not read as weights"):
        Vocals("mine", str(tmp_path / "half.safetensors"))
    save_safetensors(tiny(), tmp_path / "other.safetensors", klass="os.path")
    with pytest.raises(UserError, match=r"holds a 'os\.path': it can be demucs\.htdemucs\.HTDemucs"):
        Vocals("mine", str(tmp_path / "other.safetensors"))


def test_missing_weights_and_a_missing_package_say_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(UserError) as said:
        load_steps([VocalsConfig(kind="vocals", model="htdemucs_ft")])
    assert str(said.value).splitlines()[1].startswith("Fetch them once with `hf download adefossez/HTDemucs-ft`, or")
    with pytest.raises(UserError, match=f"{tmp_path} has no files of the Demucs model 'mdx'"):
        steps_digests([VocalsConfig(kind="vocals", model="mdx", weights=str(tmp_path))])
    monkeypatch.setattr(demucs_weights, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs a package that is missing: pip install 'stretto\[vocals\]'"):
        steps_digests([VocalsConfig(kind="vocals")])
    assert importlib.util.find_spec("demucs")
