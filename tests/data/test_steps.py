"""Preprocessing steps: what each leaves in the records, and what is said of one that cannot be had."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from ranks import run_ranks
from tokenising import CONFIG, Embedder, contents, fit, job

import data.tokenise
import data.tokeniser
from data.config import TokensConfig
from data.corpus import Clip, write_clips
from data.progress import Progress
from data.shards import first_records
from data.steps import load_steps, steps_digests
from data.steps.base import Step
from data.steps.captions import Captions
from data.token_statistics import token_statistics
from data.tokenise import tokenise
from data.waves import Kind
from data.windows import window_loader
from launcher.recipe import dump_recipe, load_recipe, read_run_recipe
from launcher.stages.data import tokens_keys
from model import artifact
from model.errors import UserError

RATE = 16_000
SECONDS = 2.0
NOTES = {"c": 261.63, "a": 440.0, "deep a": 110.0, "g sharp": 830.61}
EVERY_STEP: list[dict[str, Any]] = [
    {"kind": "captions", "templates": ["{caption}", "{instrument} music: {caption}"]},
    {"kind": "chroma"},
    {"kind": "features", "of": "mel", "bands": 24},
    {"kind": "features", "of": "mfcc", "rate_hz": 25, "bands": 13},
    {"kind": "features", "of": "chroma", "rate_hz": 12.5},
    {"kind": "own_step:Loudest", "rate": 22_050, "scale": 2.0},
]


def tone(hertz: float, seconds: float = SECONDS) -> np.ndarray:
    return 0.3 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of one note each, of silence and of noise, one of them shorter, and a codec and quantizers beside it."""
    folder = tmp_path_factory.mktemp("made")
    fit(folder)
    waves = {name: tone(hertz) for name, hertz in NOTES.items()}
    waves["silence"] = np.zeros_like(waves["a"])
    waves["noise"] = np.random.default_rng(0).uniform(-0.5, 0.5, len(waves["a"]))
    waves["short a"] = tone(440.0, 1.26)
    (folder / "corpus").mkdir()
    clips = []
    for name, wave in waves.items():
        soundfile.write(folder / "corpus" / f"{name}.wav", wave, RATE, subtype="FLOAT")
        split = "validation" if name == "c" else "train"
        attributes = {"instrument": "sine"} if name in NOTES else None
        clips.append(Clip(name, f"{name}.wav", 0.0, len(wave) / RATE, (f"a {name}",), split, attributes))
    write_clips(folder / "corpus", clips)
    return folder / "corpus"


def made(
    corpus: Path, path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The records of the token artifact `path`, made with `steps`."""
    monkeypatch.setattr(data.tokeniser, "load_joint_embedder", lambda folder, config: Embedder())
    fitted = corpus.parent
    with artifact.create(path, "tokens", "made") as (folder, info):
        config, unchecked = TokensConfig.model_validate({"steps": steps}), CONFIG.model_copy(update={"check": False})
        info.update(tokenise(corpus, fitted, fitted, fitted, unchecked, config, folder, Progress())[0])
    return {row["id"]: row for split in ("train", "validation") for row in first_records(path / split, 100)}


def wrong(*steps: dict[str, Any]) -> str:
    """What is said of a recipe with these steps."""
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", [f"tokens.steps={json.dumps(steps)}"])
    return str(caught.value)


def test_melody_tokens_are_the_pitch_class_of_each_frame(corpus, tmp_path, monkeypatch):
    rows = made(corpus, tmp_path / "tokens", monkeypatch, [{"kind": "chroma"}])
    expected = {"c": 0, "a": 9, "deep a": 9, "g sharp": 8, "silence": 12, "noise": 12, "short a": 9}
    assert rows.keys() == expected.keys()
    for name, pitch_class in expected.items():
        chroma = rows[name]["chroma"]
        assert (chroma.dtype, set(chroma.tolist())) == (np.uint8, {pitch_class}), name
        assert len(chroma) == (12 if name == "short a" else 20)


def test_inspect_counts_melody_tokens_and_the_loader_passes_them_over(corpus, tmp_path, monkeypatch):
    made(corpus, tmp_path / "tokens", monkeypatch, EVERY_STEP)
    tokens = artifact.read(tmp_path / "tokens", "tokens")
    assert tokens.info["fields"]["chroma"] == {"name": "chroma", "rate_hz": 10, "quantizers": 1, "codebook_size": 13}
    assert tokens.info["steps"][3] == {
        "kind": "features", "of": "mfcc", "rate_hz": 25, "sample_rate": 16_000, "bands": 13,
    }  # fmt: skip
    found = token_statistics(tokens, "train").fields["chroma"]
    assert found.counts[0].nonzero()[0].tolist() == [8, 9, 12]
    assert (found.frames, found.shortest, found.longest, found.outside) == (112, 12, 20, 0)
    (batch,) = window_loader(tokens.path, "train", ["acoustic"], 1.0, batch=4, seed=0, global_batch=4)
    assert batch.keys() == {"acoustic", "draw"}


def test_features_lie_beside_the_tokens(corpus, tmp_path, monkeypatch):
    rows = made(corpus, tmp_path / "tokens", monkeypatch, EVERY_STEP)
    names = ("mel", "mfcc", "chroma_features")
    for name, row in rows.items():
        shapes = [row[feature].shape for feature in names]
        assert shapes == ([(62, 24), (31, 13), (15, 12)] if name == "short a" else [(100, 24), (50, 13), (25, 12)])
        assert {row[feature].dtype for feature in names} == {np.dtype(np.float16)}
    middle = {name: row["mel"][50].astype(float) for name, row in rows.items() if name != "short a"}
    centre = {name: mel.argmax() for name, mel in middle.items()}
    assert centre["deep a"] < centre["c"] < centre["a"] < centre["g sharp"]
    # Silence has the lowest value everywhere, and of its cosine transform the first coefficient alone.
    np.testing.assert_allclose(middle["silence"], math.log(1e-6), atol=0.01)
    silent = rows["silence"]["mfcc"][25].astype(float)
    np.testing.assert_allclose(silent, [math.log(1e-6) * math.sqrt(40), *[0] * 12], atol=0.05)
    assert rows["a"]["chroma_features"][12].argmax() == 9
    assert np.linalg.norm(rows["noise"]["chroma_features"][12].astype(float)) == pytest.approx(1, abs=0.01)
    assert not rows["silence"]["chroma_features"].any()


def test_a_step_of_the_users_own(corpus, tmp_path, monkeypatch):
    rows = made(corpus, tmp_path / "tokens", monkeypatch, EVERY_STEP)
    assert {row["clip"] for row in rows.values()} == rows.keys()
    assert rows["silence"]["loudest"] == 0
    assert rows["a"]["loudest"] == pytest.approx(0.6, abs=0.03)


def test_captions_are_rewritten_before_they_are_encoded(corpus, tmp_path, monkeypatch):
    rows = made(corpus, tmp_path / "tokens", monkeypatch, EVERY_STEP)
    assert json.loads(rows["c"]["captions"]) == ["a c", "sine music: a c"]
    assert json.loads(rows["noise"]["captions"]) == ["a noise"]  # which has no instrument
    assert [len(rows[name]["text_conditioning"]) for name in ("c", "noise")] == [2, 1]


class Silencer(Step):
    """Stands for a step that changes what is heard after it, as the one that takes out vocals does."""

    kinds = ((44_100, 2),)

    def audio(self, waves: dict[Kind, torch.Tensor]) -> dict[Kind, torch.Tensor]:
        assert waves[44_100, 2].shape[1] == 2
        return {kind: torch.zeros_like(wave) for kind, wave in waves.items()}


@pytest.mark.parametrize(("place", "pitch_class"), [(0, 12), (1, 9)])
def test_steps_hear_what_those_before_them_leave_and_encoders_what_all_do(
    corpus, tmp_path, monkeypatch, place, pitch_class
):
    steps = load_steps(TokensConfig.model_validate({"steps": [{"kind": "chroma"}]}).steps)
    monkeypatch.setattr(data.tokenise, "load_steps", lambda _: [*steps[:place], Silencer(), *steps[place:]])
    rows = made(corpus, tmp_path / "tokens", monkeypatch, [])
    assert set(rows["a"]["chroma"].tolist()) == {pitch_class}
    for name in ("acoustic", "semantic", "conditioning"):
        np.testing.assert_array_equal(rows["a"][name], rows["silence"][name])


def test_the_number_of_ranks_changes_no_byte(corpus, tmp_path):
    for ranks in (1, 2):
        settings = {"batch_seconds": 4.0, "steps": EVERY_STEP}
        run_ranks(job, ranks, tmp_path / f"log-{ranks}", corpus, tmp_path / f"tokens-{ranks}", settings)
    assert contents(tmp_path / "tokens-1") == contents(tmp_path / "tokens-2")


def test_templates_take_captions_and_columns_of_the_manifest():
    clip = Clip("1", "1.wav", 0, 1, ("slow", "sad"), "train", columns={"artist": "Ann", "year": 1970})
    rewritten = Captions(["{caption}", "{caption} song by {artist}", "{artist}, {{{year}}}"]).rewritten
    assert rewritten(clip) == ("slow", "slow song by Ann", "Ann, {1970}", "sad", "sad song by Ann")
    assert rewritten(replace(clip, captions=())) == ("Ann, {1970}",)
    nobody = replace(clip, columns={"artist": None, "year": ""})
    assert rewritten(nobody) == ("slow", "sad")
    assert Captions(["by {artist}"]).rewritten(nobody) == ("slow", "sad")
    assert Captions(["by {artist}"]).rewritten(replace(nobody, captions=())) == ()


def test_a_name_in_a_template_that_no_clip_has_is_an_error_before_work_starts(corpus, tmp_path, monkeypatch):
    steps = [{"kind": "captions", "templates": ["{caption} by {instruments}"]}]
    with pytest.raises(UserError, match=r"has \{instruments\}, which no clip has. Did you mean instrument\?\n") as said:
        made(corpus, tmp_path / "tokens", monkeypatch, steps)
    assert str(said.value).endswith("There is {caption}, {instrument}.")


def test_a_clip_without_a_frame_is_an_error_before_work_starts(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"at rate_hz 0\.5 a clip of 1\.24 s has no frame: raise it to 0\.806 or more"):
        made(corpus, tmp_path / "tokens", monkeypatch, [{"kind": "chroma", "rate_hz": 0.5}])


@pytest.mark.parametrize(
    "steps", [[EVERY_STEP[2], EVERY_STEP[2]], [{"kind": "own_step:Twice"}]], ids=["two of ours", "one of the record's"]
)
def test_two_makers_of_one_column_are_an_error(corpus, tmp_path, monkeypatch, steps):
    with pytest.raises(UserError, match=r"two steps make the column (mel|semantic): leave one of them out"):
        made(corpus, tmp_path / "tokens", monkeypatch, steps)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            {"kind": "vocal"},
            "tokens.steps.0.kind is 'vocal': it must be one of 'vocals', 'chroma', 'features', ",
        ),
        ({"kind": "vocal"}, "'package.module:Class'. Did you mean vocals?"),
        ({"rate_hz": 5}, "tokens.steps.0.kind is missing from the recipe."),
        ({"kind": "chroma", "rate": 5}, "tokens.steps.0.rate is not a key of a recipe. Did you mean rate_hz?"),
        ({"kind": "chroma", "rate_hz": "x"}, "tokens.steps.0.rate_hz is 'x': it must be a number."),
        ({"kind": "chroma", "rate_hz": 7}, "tokens.steps.0: sample_rate 16000 must be a multiple of rate_hz 7."),
        ({"kind": "features"}, "tokens.steps.0.of is missing from the recipe."),
        ({"kind": "features", "of": "mels"}, "tokens.steps.0.of is 'mels': it must be 'mel', 'mfcc' or 'chroma'."),
        ({"kind": "features", "of": "mfcc", "bands": 41}, "tokens.steps.0: bands 41 must be at most 40 where mfcc"),
        ({"kind": "features", "of": "chroma", "bands": 24}, "chroma has always 12: leave it out."),
        ({"kind": "captions", "templates": ["{caption"]}, "tokens.steps.0.templates: '{caption' is no template: expec"),
        ({"kind": "captions", "templates": ["{}"]}, "between braces there is nothing but a name."),
        ({"kind": "captions", "templates": ["{year:.0f}"]}, "between braces there is nothing but a name."),
        ({"kind": "my steps:Loud"}, "tokens.steps.0.kind: 'my steps:Loud' is not the name of a class, such as package"),
    ],
)
def test_a_wrong_step_is_named_in_the_recipe(step, words):
    assert words in wrong(step)


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        (
            "own_steps:Loudest",
            {},
            "tokens.steps.0.kind names the module own_steps, which Python does not find: ",
        ),
        ("no.such:Step", {}, "tokens.steps.0.kind names the module no.such, which Python does not find"),
        ("own_step:Louder", {}, "tokens.steps.0.kind is 'own_step:Louder': the module own_step has no Louder."),
        (
            "own_step:Loudest",
            {"rat": 3},
            "tokens.steps.0 (own_step:Loudest): its keys are those of Loudest(rate: ",
        ),
    ],
)
def test_an_own_step_that_cannot_be_had_is_named(kind, keys, words):
    config = TokensConfig.model_validate({"steps": [{"kind": kind, **keys}]})
    with pytest.raises(UserError) as caught:
        load_steps(config.steps)
    assert words in str(caught.value)


def test_a_run_keeps_its_steps_and_their_keys_and_code_tell_its_tokens_apart(tmp_path, monkeypatch):
    recipe = load_recipe("quickstart", [f"tokens.steps={json.dumps(EVERY_STEP)}", "tokens.steps.3.rate_hz=50"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert read_run_recipe(tmp_path) == recipe
    before = tokens_keys(recipe)
    assert before["tokens.steps"][5] == EVERY_STEP[5]
    assert before["tokens.steps"][3]["rate_hz"] == 50
    module = tmp_path / "changing_step.py"
    module.write_text("from own_step import Loudest\n")
    monkeypatch.syspath_prepend(tmp_path)
    steps = TokensConfig.model_validate({"steps": [{"kind": "changing_step:Loudest", "rate": 8000}]}).steps
    first = steps_digests(steps)
    module.write_text("from own_step import Loudest  # changed\n")
    assert first.keys() == {"the code of tokens.steps.0"}
    assert steps_digests(steps) != first
