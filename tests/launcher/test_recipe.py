from __future__ import annotations

from pathlib import Path

import pytest

from launcher.recipe import builtin_names, dump_recipe, load_recipe, read_run_recipe
from model.errors import UserError


def wrong(*overrides: str, recipe: str = "quickstart") -> str:
    """What is said of a recipe with these overrides."""
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["quickstart", "musiclm_small", "musiclm_large"])
def test_builtin_recipes_are_sound(name):
    assert name in builtin_names()
    assert load_recipe(name).name == name


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_compile_is_switched_by_a_bare_word(tmp_path, word):
    """Which YAML takes for a truth value; it is kept as the word."""
    recipe = load_recipe("quickstart", [f"stage_defaults.train.compile={word}"])
    assert recipe.stages.fine.train.compile == word
    again = load_recipe(written(tmp_path, dump_recipe(recipe)))
    assert again.stages.fine.train.compile == word


def test_stages_start_from_the_defaults_and_their_own_keys_win(tmp_path):
    text = """
        stage_defaults: {train: {steps: 100, learning_rate: 0.5, micro_batch: 4}, model: {transformer: {dim: 64}}}
        stages:
          semantic: {model: {field: semantic}}
          coarse: {model: {field: acoustic, last: 3}, train: {steps: 200, micro_batch: null}}
          fine: {model: {field: acoustic, first: 3}}
        """
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.name == "mine"
    assert [recipe.stages.semantic.train.steps, recipe.stages.coarse.train.steps] == [100, 200]
    assert recipe.stages.coarse.train.learning_rate == 0.5
    assert recipe.stages.coarse.train.micro_batch is None
    assert recipe.stages.fine.model.transformer.dim == 64


def test_overrides_are_read_as_yaml_and_reach_lists():
    recipe = load_recipe(
        "quickstart",
        [
            "data.clips=64",
            "stages.semantic.train.learning_rate=3e-4",
            "stages.semantic.model.conditions.0.paths=[prefix]",
            "sampling.cfg={fine: 1.5}",
        ],
    )
    assert recipe.data.clips == 64
    assert recipe.stages.semantic.train.learning_rate == 3e-4
    assert recipe.stages.semantic.model.conditions[0].paths == ["prefix"]
    assert recipe.sampling.cfg == {"fine": 1.5}


def test_an_override_of_the_defaults_reaches_every_stage_and_yields_to_one_of_a_stage():
    recipe = load_recipe("quickstart", ["stages.fine.train.steps=70", "stage_defaults.train.steps=60"])
    steps = [getattr(recipe.stages, name).train.steps for name in ("semantic", "coarse", "fine")]
    assert steps == [60, 60, 70]


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    mix = "stages.fine.train.mix=[{tokens: tokens}, {tokens: s3://bucket/tokens}]"
    recipe = load_recipe("quickstart", ["data.audio=music", mix, "stages.fine.train.cache=cache"])
    assert recipe.data.audio == str(tmp_path / "music")
    train = recipe.stages.fine.train
    assert [other.tokens for other in train.mix] == [str(tmp_path / "tokens"), "s3://bucket/tokens"]
    assert train.cache == str(tmp_path / "cache")
    recipe = load_recipe("quickstart", ["data.audio=shards-{000..010}.tar"])
    assert recipe.data.audio == str(tmp_path / "shards-{000..010}.tar")


@pytest.mark.parametrize("address", ["s3://bucket/music", "gs://bucket/songs.jsonl", "s3://bucket/s-{00..10}.tar"])
def test_addresses_stay_as_they_are(address):
    assert load_recipe("quickstart", [f"data.audio={address}"]).data.audio == address


def test_a_run_keeps_the_resolved_recipe(tmp_path):
    recipe = load_recipe("quickstart", ["stage_defaults.train.steps=60"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert read_run_recipe(tmp_path) == recipe


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        read_run_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.clipz=3", "data.clipz is not a key of a recipe. Did you mean clips?"),
        ("stages.semantic.train.stepz=3", "stages.semantic.train.stepz is not a key of a recipe. Did you mean steps?"),
        ("stages.fine.train.filter={year: {mni: 3}}", "stages.fine.train.filter.year.mni is not a key of a recipe."),
        ("stages.fine.train.filter={year: null}", "filter.year is None: it must be true or false or a whole number"),
        ("stages.fine.train.cache_limit=lots", "cache_limit 'lots' must be a number of bytes, or one such as 20gb"),
        ("stages.semantics.train.steps=3", "stages.semantics is not a key of a recipe. Did you mean semantic?"),
        ("qqq=3", "qqq is not a key of a recipe. It can be name, description, seed,"),
        ("sampling.cfg.course=2", "sampling.cfg.course is not a key of a recipe"),
        ("seed=abc", "seed is 'abc': it must be a whole number."),
        ("data.clips=1.5", "data.clips is 1.5: it must be a whole number."),
        ("parallel=0", "parallel is 0: it must be more than 0."),
        ("data.validation=1", "data.validation is 1: it must be less than 1."),
        ("data=5", "data is 5: it must be keys and values."),
        ("stages.fine.train.micro_batch=-3", "micro_batch is -3: it must be more than 0 or 'auto'."),
        (
            "stage_defaults.train.resume=alway",
            "train.resume is 'alway': it must be a whole number or 'auto' or 'always'. Did you mean always?",
        ),
        ("encoders.codec.kind=mell", "encoders.codec.kind is 'mell': it must be 'mel' or 'encodec'. Did you mean mel?"),
        ("stages.fine.train.zero=zero9", "stages.fine.train.zero: There is no DeepSpeed configuration 'zero9'"),
        ("name=a/b", "name is 'a/b'"),
        ("seed.x=1", "seed is a value and has no keys below it"),
        ("stages.semantic.model.conditions.4.field=semantic", "4 is not one of its 1 entries"),
        ("data.clips", "'data.clips' is not an override"),
        ("data.clips=[", "does not read as YAML"),
        ("data.captions=x.csv", "data.captions is set but data.audio is not"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, words):
    assert words in wrong(override)


def test_every_problem_has_a_line_and_one_of_all_stages_has_one():
    lines = wrong("stage_defaults.train.stepz=3", "seed=-1").splitlines()
    assert lines == [
        "seed is -1: it must be at least 0.",
        "stage_defaults.train.stepz is not a key of a recipe. Did you mean steps?",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["stages.coarse.model.window_seconds=7"],
            "stages.coarse.model.window_seconds is 7: it must be at most data.cl",
        ),
        (
            ["stages.coarse.model.window_seconds=2.51"],
            "a whole number of acoustic frames, of which there are 25 a second",
        ),
        (["stages.coarse.model.last=9"], "takes quantizers 0 up to 9 of acoustic, which has 8"),
        (["stages.fine.model.first=4"], "together they must cover 0 up to 8 without gap or overlap"),
        (["stages.fine.model.conditions.1.last=5"], "the coarse stage makes only 3: set its last to 3"),
        (["stages.coarse.model.field=semantic"], "the coarse stage predicts 'acoustic'"),
        (["stages.semantic.model.conditions.0.field=acoustic"], "the semantic stage can be conditioned on 'condit"),
        (["stages.fine.model.conditions.1.paths=[summed]"], "acoustic codes have no centroids to sum"),
        (["data.audio=x", "data.captions=y", "data.format=mds"], "data.captions goes with a folder of files, not with"),
        (["data.audio=x", "data.validation=0.5", "data.test=0.5"], "leave nothing to train on: lower them"),
        (["data.split_by=artist"], "data.split_by is set but data.audio is not"),
        (
            ["stages.fine.train.cache_limit=1gb"],
            "stages.fine.train.cache_limit is set, but the token shards lie",
        ),
        (["tokens.compression=zip"], "tokens.compression: must be one of zstd (levels to 22)"),
        (["tokens.compression=zstd:30"], "tokens.compression: must be one of zstd (levels to 22)"),
        (["tokens.upload=/here"], "tokens.upload: must be an address such as s3://bucket/prefix"),
        (["data.shortest_seconds=1"], "data.shortest_seconds is set but data.audio is not"),
        (["data.audio=music", "data.shortest_seconds=6"], "data.shortest_seconds is 6: it must be at most data.clip"),
        (["data.audio=music", "data.shortest_seconds=0.03"], "is 0.03: it must be at least 0.04, the time that is a"),
        (
            ["data.audio=music", "data.shortest_seconds=2", "stages.coarse.train.packing=true"],
            "stages.fine.model.window_seconds is 5 and data.shortest_seconds 2: windows of different lengths need "
            "stages.fine.train.packing=true.",
        ),
        (
            ["stage_defaults.train={packing: true, compile: 'on'}"],
            "stages.coarse.train.compile is on, which packing does not go with, as lengths change each step: set it to",
        ),
        (["encoders.codec.frame_rate=30"], "encoders.codec.sample_rate 16000 must be a multiple of its frame_rate 30"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(overrides, words):
    assert words in wrong(*overrides)


def test_short_clips_are_for_stages_that_pack_or_have_shorter_windows():
    short = ["data.audio=music", "data.shortest_seconds=2.03"]
    assert load_recipe("quickstart", [*short, "stage_defaults.train.packing=true"]).data.shortest_seconds == 2.03
    load_recipe("quickstart", [*short, "stage_defaults.model.window_seconds=2"])
    said = wrong(*short, "stage_defaults.model.window_seconds=2.04")
    assert len(said.splitlines()) == 3


def test_an_unknown_recipe_gets_the_nearest_name():
    assert "Did you mean quickstart?" in wrong(recipe="quickstrat")
    assert "nowhere.yaml is not a recipe file" in wrong(recipe="nowhere.yaml")


def test_a_syntax_error_has_its_line(tmp_path):
    assert "line 3" in wrong(recipe=written(tmp_path, "name: x\nstages:\n  a: b: c\n"))
    assert "must hold keys and values" in wrong(recipe=written(tmp_path, "- 1\n"))
