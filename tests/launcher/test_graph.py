from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.graph import check_graph, origins, plan_stages, state_of
from launcher.recipe import Recipe, load_recipe
from launcher.run_folder import RunFolder
from launcher.stage import Stage, picked
from launcher.stages import STAGES
from launcher.worker import take_over
from model import artifact
from model.errors import UserError

ALL = [stage.name for stage in STAGES]


def make_all(run: Path, recipe: Recipe) -> None:
    """Puts empty but whole artifacts of every stage in `run`, as a finished run would."""
    with RunFolder.opened(run, recipe) as folder:
        folder.adopt(recipe)
        for stage, origin in zip(STAGES, origins(recipe).values(), strict=True):
            with artifact.create(run / stage.name, stage.makes, origin.fingerprint) as (partial, _):
                (partial / "file").write_text(stage.name)
            folder.record(stage.name, state="done", made_from=origin.to_json())


def changed(*overrides: str) -> set[str]:
    """The stages whose fingerprints these overrides change."""
    before, after = origins(load_recipe("quickstart")), origins(load_recipe("quickstart", overrides))
    return {name for name in before if before[name].fingerprint != after[name].fingerprint}


def test_needs_that_nothing_makes_and_circles_are_named():
    check_graph(STAGES)
    graph = [Stage("tokens", ("corpsu", "coarse"), picked(), 1, None), Stage("coarse", ("tokens",), picked(), 1, None)]
    graph.append(Stage("corpus", (), picked(), 1, None))
    with pytest.raises(UserError) as caught:
        check_graph(graph)
    assert str(caught.value).splitlines() == [
        "stage 'tokens' needs 'corpsu', which there is not. Did you mean corpus?",
        "stage 'tokens' needs 'coarse', which is not made before it: is it a circle?",
    ]


FITTED_STAGES = {"codec", "embedding", "quantizers"}
TRAINED = {"semantic", "coarse", "fine"}
END = {"bundle", "samples"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.clips=100"], set(ALL)),
        (["seed=1"], set(ALL)),
        (["encoders.codec.codebook_size=128"], {"codec", "tokens"} | TRAINED | END),
        (["encoders.joint.steps=7"], {"embedding", "quantizers", "tokens"} | TRAINED | END),
        (["encoders.joint.hop_seconds=2"], {"quantizers", "tokens"} | TRAINED | END),
        (["quantizers.semantic.codebook_size=32"], {"quantizers", "tokens"} | TRAINED | END),
        (["stages.coarse.train.steps=700"], {"coarse"} | END),
        (["stages.fine.model.transformer.layers=2"], {"fine"} | END),
        (["stages.fine.train.filter={genre: jazz}"], {"fine"} | END),
        (["stages.fine.train.curriculum=[{steps: 5, filter: {seconds: {min: 2}}}, {}]"], {"fine"} | END),
        (["sampling.cfg.fine=3"], END),
        (["evaluation.prompts=3"], {"samples"}),
    ],
)
def test_a_changed_key_changes_what_depends_on_it_and_nothing_else(overrides, expected):
    assert changed(*overrides) == expected


def test_how_often_is_validated_counts_where_the_schedule_learns_by_it():
    def fingerprint(*overrides):
        return origins(load_recipe("quickstart", overrides))["fine"].fingerprint

    for override in ("stages.fine.train.validate_every=3", "stages.fine.train.validate_windows=5"):
        assert fingerprint(override) == fingerprint()
        plateau = "stages.fine.train.schedule=plateau"
        assert fingerprint(plateau, override) != fingerprint(plateau)


def test_weights_that_a_stage_begins_with_count_wherever_they_lie(tmp_path: Path) -> None:
    def begun(folder: Path, fingerprint: str) -> str:
        with artifact.create(folder, "weights", fingerprint):
            pass
        return origins(load_recipe("quickstart", [f"stages.fine.train.init_from={folder}"]))["fine"].fingerprint

    before, first = origins(load_recipe("quickstart"))["fine"].fingerprint, begun(tmp_path / "one", "a")
    assert first != before
    assert begun(tmp_path / "two", "a") == first
    assert begun(tmp_path / "two", "b") != first
    with pytest.raises(UserError, match=r"stages.fine.train.init_from: .*nowhere does not exist"):
        origins(load_recipe("quickstart", [f"stages.fine.train.init_from={tmp_path}/nowhere"]))
    with artifact.create(tmp_path / "tokens", "tokens", "t"):
        pass
    with pytest.raises(UserError, match=r"stages.fine.train.init_from: .* is of kind 'tokens' and holds no weights"):
        origins(load_recipe("quickstart", [f"stages.fine.train.init_from={tmp_path}/tokens"]))


def test_tokens_that_are_mixed_in_count_wherever_they_lie(tmp_path: Path) -> None:
    def fingerprints(*overrides: str) -> dict[str, str]:
        return {name: origin.fingerprint for name, origin in origins(load_recipe("quickstart", overrides)).items()}

    def mixed(folder: Path, fingerprint: str, weight: float = 1.0) -> dict[str, str]:
        with artifact.create(folder, "tokens", fingerprint):
            pass
        return fingerprints(f"stages.fine.train.mix=[{{tokens: {folder}, weight: {weight}}}]")

    before, first = fingerprints(), mixed(tmp_path / "one", "a")
    assert {name for name in before if before[name] != first[name]} == {"fine"} | END
    assert mixed(tmp_path / "two", "a") == first
    assert mixed(tmp_path / "two", "b") != first
    assert mixed(tmp_path / "two", "a", weight=2.0) != first
    with pytest.raises(UserError, match="nowhere is not a finished Stretto artifact"):
        fingerprints(f"stages.fine.train.mix=[{{tokens: {tmp_path}/nowhere}}]")


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "description=words",
        "parallel=3",
        "data.silence_db=-50",  # the built-in corpus has no silence
        "stage_defaults.train.ranks=1",
        "stage_defaults.train.micro_batch=2",
        "stage_defaults.train.workers=1",
        "stage_defaults.train.log_every=3",
        "stage_defaults.train.validate_every=3",
        "stage_defaults.train.checkpoint_every=3",
        "stage_defaults.train.keep_last=3",
        "stage_defaults.train.cache=elsewhere",
        "data.ranks=4",
        "data.workers=1",
        "tokens.batch_seconds=10",
    ],
)
def test_where_and_how_often_changes_nothing(override):
    assert changed(override) == set()


def test_how_much_of_a_bucket_is_kept_here_changes_nothing():
    remote = "tokens.upload=s3://bucket/tokens"
    assert changed(remote, "stage_defaults.train.cache_limit=20gb") == changed(remote) == {"tokens"} | TRAINED | END


def test_a_changed_file_of_the_users_changes_the_corpus(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"one")
    recipe = load_recipe("quickstart", [f"data.audio={tmp_path}"])
    before = origins(recipe)["corpus"].fingerprint
    (tmp_path / "b.wav").write_bytes(b"two")
    assert origins(recipe)["corpus"].fingerprint != before


def test_a_new_folder_lacks_everything_and_a_finished_one_nothing(tmp_path):
    recipe = load_recipe("quickstart")
    assert {state.state for state in state_of(tmp_path / "run", recipe).values()} == {"missing"}
    make_all(tmp_path / "run", recipe)
    assert all(state.done for state in state_of(tmp_path / "run", recipe).values())


def test_an_outdated_stage_says_which_key_or_input_changed(tmp_path):
    make_all(tmp_path, load_recipe("quickstart", ["stages.coarse.train.steps=600"]))
    states = state_of(tmp_path, load_recipe("quickstart", ["stages.coarse.train.steps=700"]))
    assert [name for name, state in states.items() if not state.done] == ["coarse", "bundle", "samples"]
    assert states["coarse"].reasons == ("stages.coarse.train.steps: 600 → 700",)
    assert states["bundle"].reasons == ("coarse changed",)


def test_a_file_that_is_gone_makes_its_stage_outdated(tmp_path):
    recipe = load_recipe("quickstart")
    make_all(tmp_path, recipe)
    (tmp_path / "codec" / "file").unlink()
    states = state_of(tmp_path, recipe)
    assert states["codec"].state == "outdated"
    assert "file is missing" in states["codec"].reasons[0]
    assert states["tokens"].done  # it would be made of the same


def test_what_a_later_version_made_is_not_made_anew(tmp_path):
    recipe = load_recipe("quickstart")
    make_all(tmp_path, recipe)
    manifest = tmp_path / "tokens" / artifact.MANIFEST
    artifact.write_json(manifest, {**json.loads(manifest.read_text()), "format_version": 2})
    with pytest.raises(UserError, match="tokens has format version 2; this Stretto reads up to 1: upgrade it"):
        state_of(tmp_path, recipe)


def test_checkpoints_are_gone_on_with_only_when_they_fit(tmp_path):
    recipe = load_recipe("quickstart")
    (tmp_path / "coarse" / "checkpoints" / "step-00000020").mkdir(parents=True)
    artifact.write_json(tmp_path / "coarse" / "stage.json", {"fingerprint": origins(recipe)["coarse"].fingerprint})
    assert state_of(tmp_path, recipe)["coarse"].state == "partial"
    other = load_recipe("quickstart", ["stages.coarse.train.steps=700"])
    assert state_of(tmp_path, other)["coarse"].state == "outdated"


def test_only_builds_what_it_names_and_says_what_else_it_needs(tmp_path):
    recipe = load_recipe("quickstart")
    states = state_of(tmp_path, recipe)
    assert [stage.name for stage in plan_stages(states, [])] == ALL
    assert [stage.name for stage in plan_stages(states, ["codec", "corpus"])] == ["corpus", "codec"]
    with pytest.raises(UserError, match="stage 'embedding' needs corpus, which is not up to date"):
        plan_stages(states, ["embedding"])
    with pytest.raises(UserError, match="Did you mean corpus"):
        plan_stages(states, ["corups"])


def fitted(run: Path) -> Path:
    make_all(run, load_recipe("quickstart"))
    return run


def test_what_is_taken_over_from_another_run_keeps_its_fingerprint(tmp_path):
    """So that the tokens of both runs can be mixed; what is made of it is the new run's own."""
    other = fitted(tmp_path / "other")
    before = origins(load_recipe("quickstart"))
    found = origins(load_recipe("quickstart", [f"fitted_from={other}", "data.clips=100"]))
    assert {name for name in found if found[name].fingerprint == before[name].fingerprint} == FITTED_STAGES
    assert found["tokens"].inputs["quantizers"] == before["quantizers"].fingerprint
    run = tmp_path / "run"
    for name in FITTED_STAGES:
        take_over(other / name, found[name], run / name)
        assert artifact.read(run / name, name).fingerprint == before[name].fingerprint
        assert artifact.problems(artifact.read(run / name)) == []
        assert (run / name / "file").read_text() == name
    (other / "codec" / "file").write_text("other")
    with pytest.raises(UserError, match=r"fitted_from: .*codec cannot be taken over: .*has changed"):
        take_over(other / "codec", found["codec"], run / "codec")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoders.codec.codebook_size=128"], "encoders.codec.codebook_size is 128 here and 256 in"),
        (["quantizers.semantic.levels=2"], "quantizers.semantic.levels is 2 here and 1 in"),
        (["fitted_from=/nowhere"], "is not a run folder"),
    ],
)
def test_a_run_that_does_not_fit_is_not_taken_over(tmp_path, overrides, words):
    other = fitted(tmp_path / "other")
    with pytest.raises(UserError, match=words):
        origins(load_recipe("quickstart", [f"fitted_from={other}", *overrides]))


def test_a_run_that_is_not_finished_is_not_taken_over(tmp_path):
    other = fitted(tmp_path / "other")
    (other / "quantizers" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"fitted_from: .*quantizers is not a finished"):
        origins(load_recipe("quickstart", [f"fitted_from={other}"]))
