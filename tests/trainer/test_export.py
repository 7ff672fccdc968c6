"""What leaves a run is what was trained, and says what it is; what would not be is refused, and leaves nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from finished_run import STEPS, make_finished_run
from safetensors.torch import load_file

import trainer.export
from data.progress import Progress
from model import MusicPipeline, artifact
from model.config import STAGES
from model.errors import UserError
from trainer.checkpoint_folder import step_name
from trainer.export import ExportOptions, export_bundle
from trainer.tensor_files import write_tensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("run") / "run", average=True)


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def export(run, folder, **options):
    """The bundle's manifest."""
    with artifact.create(folder, "bundle", "b" * 16) as (partial, info):
        info.update(export_bundle(run, partial, Progress(), ExportOptions(**options)))
    assert artifact.problems(artifact.read(folder)) == []
    return artifact.read(folder).info


def refused(run, folder, error=UserError, **options):
    """What is said; nothing is left."""
    with pytest.raises(error) as caught:
        export(run, folder, **options)
    assert [path.name for path in folder.parent.iterdir() if "bundle" in path.name] == []
    return str(caught.value)


def change(folder, key, place, value):
    """Sets one weight of a finished stage, whose manifest says that it is as it should be."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights[key][place] = value
    write_tensors(folder / "model.safetensors", weights)
    found = artifact.read(folder)
    names = found.manifest["files"]
    artifact.write_manifest(folder, found.kind, found.fingerprint, found.manifest["inputs"], found.info, names)


def test_a_bundle_is_what_was_trained(finished, tmp_path):
    info = export(finished, tmp_path / "bundle")
    for name in STAGES:
        trained = (finished / name / "model.safetensors").read_bytes()
        assert (tmp_path / "bundle" / f"{name}.safetensors").read_bytes() == trained
        assert info["verified"][name]["on"] == "validation windows"
        assert info["verified"][name]["largest_difference"] <= 1e-5
        digest = artifact.file_digest(finished / name / "model.safetensors")
        assert info["sources"][name] == {"fingerprint": name, "files": {"model.safetensors": digest}}
    assert set(info["sources"]) == {*STAGES, "codec", "embedding", "quantizers"}
    assert torch.__version__.startswith(info["versions"]["torch"])
    made = MusicPipeline.load(tmp_path / "bundle", "cpu").generate(["a slow flute"], seconds=0.2)
    assert made.waveform.isfinite().all()


@pytest.mark.parametrize(
    ("options", "largest", "share"),
    [({"dtype": "bf16"}, 0.51, 0.03), ({"dtype": "fp16"}, 0.51, 0.005), ({"int8": True, "dtype": "bf16"}, 0.45, 0.1)],
    ids=["bf16", "fp16", "int8"],
)
def test_fewer_bits_take_less_room_and_say_what_they_cost(finished, tmp_path, options, largest, share):
    info = export(finished, tmp_path / "bundle", **options)
    files = [f"{name}.safetensors" for name in STAGES]
    before = sum((finished / name / "model.safetensors").stat().st_size for name in STAGES)
    assert sum((tmp_path / "bundle" / file).stat().st_size for file in files) < largest * before
    assert info["weights"] == {"dtype": "fp32", "int8": False, "average": False, "last": None, **options}
    for found in info["verified"].values():
        assert 0 < found["share_of_spread"] < share
        assert found["loss_after"] == pytest.approx(found["loss_before"], rel=0.05)
    made = MusicPipeline.load(tmp_path / "bundle", "cpu").generate(["a slow flute"], seconds=0.2)
    assert made.waveform.isfinite().all()


def test_the_moving_average_is_exported(finished, tmp_path):
    export(finished, tmp_path / "bundle", average=True)
    for name in STAGES:
        average = (finished / name / "average.safetensors").read_bytes()
        assert (tmp_path / "bundle" / f"{name}.safetensors").read_bytes() == average
    assert "moving averages" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_checkpoints_are_averaged(finished, tmp_path, count):
    """One alone holds the weights as they were trained."""
    info = export(finished, tmp_path / "bundle", last=count)
    for name in STAGES:
        found = load_file(tmp_path / "bundle" / f"{name}.safetensors")
        trained = load_file(finished / name / "model.safetensors")
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[key], trained[key]) for key in found) == (count == 1)
        used = {file.split("/")[1] for file in info["sources"][name]["files"]}
        assert used == {step_name(step) for step in STEPS[-count:]}
    if count == 2:
        key = "transformer.blocks.0.attention.q.weight"
        halves = [
            load_file(finished / "fine" / "checkpoints" / step_name(step) / f"rank-{rank:04d}.safetensors")
            for step in STEPS[-2:]
            for rank in range(2)
        ]
        parts = [value for half in halves for name, value in half.items() if name.startswith(f"weights/{key}/")]
        expected = (torch.cat(parts[:2]) + torch.cat(parts[2:])) / 2
        assert torch.allclose(found[key].flatten(), expected)


def test_averages_that_are_not_there_are_refused(run, tmp_path):
    said = refused(run, tmp_path / "bundle", last=4)
    assert "holds 3 checkpoints, 4 are to be averaged" in said
    assert "keep_last" in said
    with pytest.raises(UserError, match="cannot go together"):
        ExportOptions(average=True, last=2)
    with pytest.raises(UserError, match="dtype is 'fp8'"):
        ExportOptions(dtype="fp8")
    stage = artifact.read(run / "coarse")
    artifact.write_manifest(
        run / "coarse", "stage", "coarse", stage.manifest["inputs"], stage.info, ["model.safetensors"]
    )
    assert "stages.coarse.train.ema_decay" in refused(run, tmp_path / "bundle", average=True)


@pytest.mark.parametrize(
    "name",
    ["semantic/model.safetensors", "codec/codec.safetensors", "quantizers/quantizers.safetensors"],
)
def test_a_damaged_source_is_named(run, tmp_path, name):
    data = bytearray((run / name).read_bytes())
    data[-1] ^= 1
    (run / name).write_bytes(data)
    assert f"{run / name} has changed" in refused(run, tmp_path / "bundle")


def test_a_damaged_or_foreign_checkpoint_is_named(run, tmp_path):
    place = run / "semantic" / "checkpoints" / step_name(STEPS[-2])
    file = place / "rank-0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert str(file) in refused(run, tmp_path / "bundle", last=2)
    shutil.rmtree(place)
    shutil.copytree(run / "fine" / "checkpoints" / place.name, place)
    assert "another training" in refused(run, tmp_path / "bundle", last=2)


def test_weights_that_are_not_those_saved_last_are_a_fault(run, tmp_path):
    """What the training wrote at its end and its last checkpoint must agree to the bit."""
    change(run / "fine", "heads", (0, 0, 0), 1e-3)
    assert "heads" in refused(run, tmp_path / "bundle", RuntimeError)
    shutil.rmtree(run / "fine" / "checkpoints")  # removed to save room: nothing to compare with
    export(run, tmp_path / "bundle")


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"int8": True}])
def test_an_export_that_computes_something_else_is_a_fault(run, tmp_path, monkeypatch, options):
    def spoilt(path, tensors):
        weights = dict(tensors)
        weights["heads"] = weights["heads"].roll(1, dims=1)
        return write_tensors(path, weights)

    monkeypatch.setattr(trainer.export, "write_tensors", spoilt)
    assert "exported stage 'semantic'" in refused(run, tmp_path / "bundle", RuntimeError, **options)


def test_room_is_looked_for_before_anything_is_written(run, tmp_path, monkeypatch):
    sizes = {}
    for dtype in ("fp32", "bf16"):
        export(run, tmp_path / dtype, dtype=dtype)
        sizes[dtype] = sum(file.stat().st_size for file in (tmp_path / dtype).rglob("*"))
    monkeypatch.setattr(trainer.export, "SPARE_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=sizes["bf16"] + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB are free at" in refused(run, tmp_path / "bundle")
    export(run, tmp_path / "again", dtype="bf16")


def test_values_that_fp16_cannot_hold_are_refused(run, tmp_path):
    shutil.rmtree(run / "semantic" / "checkpoints")
    change(run / "semantic", "embedding.weight", (3, 2), 1e5)
    said = refused(run, tmp_path / "bundle", dtype="fp16")
    assert "embedding.weight of stage 'semantic'" in said
    assert "bf16" in said


def test_shards_in_a_bucket_are_not_fetched(run, tmp_path):
    manifest = json.loads((run / "tokens" / "manifest.json").read_text())
    manifest["info"]["remote"] = "s3://nowhere/tokens"
    (run / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    info = export(run, tmp_path / "bundle")
    assert {found["on"] for found in info["verified"].values()} == {"random codes"}


def test_the_card_says_what_the_model_is(finished, tmp_path):
    export(finished, tmp_path / "bundle", int8=True, last=2)
    card = (tmp_path / "bundle" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "stretto"
    assert "license" not in front  # the user's to choose
    for words in (
        "Corpus: songs; 3 clips to train on and 3 to validate, 1.0 hours", "90,000 semantic", "270,000 acoustic",
        "| 6 | 1 s | 1.250 | 1.500 |", "newest 2 checkpoints", "8 bits", "`temperature`: semantic 0.9",
        "codec: `mel`, built in", "stretto generate .", "MusicPipeline.load", "torch 2",
    ):  # fmt: skip
        assert words in card, words
    assert "/home" not in card


def test_pretrained_encoders_are_named_with_licence_and_source(run, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["encoders"]["codec"] = {"kind": "encodec", "weights": "facebook/encodec_24khz"}
    recipe["encoders"]["semantic"] = {"kind": "mert", "weights": "/home/somebody/MERT-v0"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    note = {"kind": "encodec", "weights": "facebook/encodec_24khz", "digest": "d" * 16, "get": "Fetch them with `hf`."}
    with artifact.create(run / "codec", "codec", "codec") as (folder, _):
        (folder / "pretrained.json").write_text(json.dumps(note))
    info = export(run, tmp_path / "bundle")
    assert info["pretrained"] == {"codec": note}
    assert (tmp_path / "bundle" / "encoders" / "codec" / "pretrained.json").is_file()
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "`facebook/encodec_24khz` (the library is under the MIT licence" in card
    assert "Fetch them with `hf`. Their fingerprint is `dddddddddddddddd`" in card
    assert "`MERT-v0` (CC BY-NC 4.0" in card
    assert "/home" not in card
