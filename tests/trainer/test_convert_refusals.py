"""Conversions of what is damaged, foreign or in the way, which are refused in words and leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from conversions import STEP, cell_name, flip, same_bytes, saved
from safetensors.torch import load_file, save_file

from model import artifact
from model.errors import UserError
from trainer import convert as conversion
from trainer.convert import convert
from trainer.weights_kinds import weights_fingerprint


@pytest.fixture
def run(trained):
    return trained / cell_name(2, 2, "bf16")


def refusal(source, output, to="fp32", **named):
    """What is said, and that nothing is left under the name."""
    with pytest.raises(UserError) as caught:
        convert(source, output, to, **named)
    assert not output.exists()
    return str(caught.value)


@pytest.fixture
def ours(run, tmp_path):
    return shutil.copytree(saved(run), tmp_path / "ours")


@pytest.fixture
def native(run, tmp_path):
    return shutil.copytree(run / "native", tmp_path / "native") / "global_step3"


def test_a_damaged_file_of_a_checkpoint_is_named(ours, tmp_path):
    file = ours / "rank-0001.safetensors"
    whole = file.read_bytes()
    flip(file, -5)
    assert str(file) in refusal(ours, tmp_path / "out")
    file.write_bytes(whole[:-1])
    assert str(file) in refusal(ours, tmp_path / "out")
    file.unlink()
    assert f"{file} is missing" in refusal(ours, tmp_path / "out")
    file.write_bytes(whole)
    shutil.copy(file, ours / "rank-0002.safetensors")
    assert f"{ours / 'rank-0002.safetensors'} is not in the manifest" in refusal(ours, tmp_path / "out")


def test_a_rank_of_another_checkpoint_is_named(trained, ours, tmp_path):
    file = ours / "rank-0001.safetensors"
    shutil.copy(saved(trained / cell_name(3, 2, "bf16")) / file.name, file)
    assert str(file) in refusal(ours, tmp_path / "out")


def test_a_newer_format_is_refused(ours, tmp_path):
    manifest = json.loads((ours / "manifest.json").read_text())
    (ours / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert "format version 99" in refusal(ours, tmp_path / "out")


def test_a_checkpoint_that_does_not_tell_shapes_needs_its_run(run, tmp_path):
    """As the first version wrote them."""
    whole = shutil.copytree(run, tmp_path / "run")
    old = saved(whole)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["info"]["shapes"], manifest["digest"]
    manifest["fingerprint"] = artifact.fingerprint(*(manifest[key] for key in ("inputs", "info", "files")))
    (old / "manifest.json").write_text(json.dumps(manifest))
    convert(old, tmp_path / "fp32", "fp32")
    expected = load_file(run / "coarse" / "model.safetensors")
    found = load_file(tmp_path / "fp32" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    away = shutil.copytree(old, tmp_path / "away")
    assert "older version" in refusal(away, tmp_path / "out")


def optimizer_file(native, rank):
    return native / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_a_damaged_file_of_deepspeeds_is_named(native, tmp_path):
    file = optimizer_file(native, 1)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flip(file, largest.header_offset + 1000 + largest.file_size // 2)
    assert str(file) in refusal(native, tmp_path / "out", "universal")
    file.write_bytes(whole[:-100])
    assert f"{file} is truncated" in refusal(native, tmp_path / "out")
    file.write_bytes(b"")
    assert f"{file} is truncated" in refusal(native, tmp_path / "out")
    file.unlink()
    assert "1 files of optimizer states where 2 ranks" in refusal(native, tmp_path / "out")


@pytest.mark.parametrize("to", ["fp32", "universal"])
@pytest.mark.parametrize("wrote", ["ours", "native"])
def test_a_flipped_byte_is_found_or_changes_nothing(request, tmp_path, wrote, to):
    """Some lie between the tensors, or in those that are not used; but the manifest may tell of another source."""
    folder = request.getfixturevalue(wrote)
    convert(folder, tmp_path / "whole", to)
    places, found = random.Random(3), 0
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for number in range(40):
        file = places.choice(files)
        place = places.randrange(min(file.stat().st_size, 5000)) * places.choice((1, -1))
        flip(file, place)
        try:
            convert(folder, tmp_path / f"out {number}", to)
        except UserError:
            found += 1
            assert not (tmp_path / f"out {number}").exists()
        else:
            whole = same_bytes(tmp_path / f"out {number}", tmp_path / "whole", {artifact.MANIFEST})
            assert whole, (file, place)
        flip(file, place)
    assert found > (39 if wrote == "ours" else 5)


def test_files_of_two_checkpoints_in_one_folder_are_refused(trained, native, tmp_path):
    def copied(zero, ranks, precision, name):
        other = trained / cell_name(zero, ranks, precision) / "native" / "global_step3"
        return shutil.copy(other / name, native / name)

    added = copied(2, 4, "bf16", optimizer_file(native, 2).name)
    assert "3 files of optimizer states where 2 ranks" in refusal(native, tmp_path / "out")
    os.unlink(added)
    added = copied(2, 2, "fp32", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "several checkpoints" in refusal(native, tmp_path / "out")
    os.unlink(added)
    copied(2, 4, "bf16", optimizer_file(native, 1).name)
    assert f"{optimizer_file(native, 1)} is one of 4" in refusal(native, tmp_path / "out")


class Foreign:
    """What a pickle should not bring about."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_asks_for_code_is_refused_and_not_run(native, tmp_path):
    file, made = optimizer_file(native, 0), tmp_path / "made by a pickle"
    torch.save({"optimizer_state_dict": {"zero_stage": Foreign(made)}}, file)
    said = refusal(native, tmp_path / "out")
    assert f"{file} asks for" in said
    assert "mkdir" in said
    file.write_bytes(pickle.dumps({"optimizer_state_dict": Foreign(made)}))
    assert str(file) in refusal(native, tmp_path / "out")
    assert not made.exists()


def test_a_file_that_unfolds_without_end_is_refused(native, tmp_path):
    """A list of a list of the same list, each twice."""
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]
    torch.save({"module": {}, "more": deep}, next(native.rglob("*model_states.pt")))
    assert "is no checkpoint: it holds more than" in refusal(native, tmp_path / "out")


@pytest.mark.parametrize("what", [{}, {"optimizer_state_dict": {"fp32_flat_groups": 3}}, [1], {"module": 4}])
def test_a_file_that_is_laid_out_otherwise_is_refused(native, tmp_path, what):
    for file in (optimizer_file(native, 0), native / "mp_rank_00_model_states.pt"):
        torch.save(what, file)
        assert str(native) in refusal(native, tmp_path / "out")


def test_a_parameter_that_is_called_like_a_path_writes_nothing_elsewhere(native, tmp_path):
    from trainer.deepspeed_universal import universal_outputs
    from trainer.saved_sources import open_saved

    state = open_saved(native)
    state.shapes["../../escaped"] = (1,)
    with pytest.raises(UserError, match="no folder can be called"):
        universal_outputs(state, lambda count: None)


def test_a_changed_file_of_a_bundle_is_refused(run, tmp_path):
    """By the manifest beside it, also where only that file is named."""
    copy = shutil.copytree(run / "coarse", tmp_path / "coarse", ignore=shutil.ignore_patterns("checkpoints"))
    convert(copy / "model.safetensors", tmp_path / "whole", "fp32")
    flip(copy / "model.safetensors", -1)
    assert "has changed: its digest is not the one" in refusal(copy / "model.safetensors", tmp_path / "out")


def test_a_part_of_a_checkpoint_is_not_taken_for_weights(ours, tmp_path):
    part = ours / "rank-0000.safetensors"
    assert f"is a part of the checkpoint {ours}: name that folder" in refusal(part, tmp_path / "out")
    shutil.copy(part, tmp_path / "alone.safetensors")
    assert "holds slices of weights" in refusal(tmp_path / "alone.safetensors", tmp_path / "out")


def test_a_stage_that_was_trained_again_is_another_source(run, tmp_path, monkeypatch):
    """Though it was trained from the same: a conversion that was interrupted begins anew."""
    stage = tmp_path / "coarse"
    shutil.copytree(run / "coarse", stage, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    before = weights_fingerprint(stage)

    def killed(*_):
        raise KeyboardInterrupt

    seal = artifact.seal
    monkeypatch.setattr(artifact, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(stage, tmp_path / "out", "fp32")
    monkeypatch.setattr(artifact, "seal", seal)
    found, weights = artifact.read(stage), load_file(stage / "model.safetensors")
    others = {name: value + 1 for name, value in weights.items()}
    save_file(others, stage / "model.safetensors")
    artifact.write_manifest(
        stage, found.kind, found.fingerprint, found.manifest["inputs"], found.info, found.manifest["files"]
    )
    assert weights_fingerprint(stage) != before
    convert(stage, tmp_path / "out", "fp32")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(converted[name], others[name]) for name in others)


def test_what_others_have_put_beside_weights_does_not_matter(run, tmp_path):
    """A manifest of something else, and a pointer to a checkpoint that was left out."""
    shutil.copy(run / "coarse" / "model.safetensors", tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    convert(tmp_path / "model.safetensors", tmp_path / "out", "fp32")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "latest").write_text("global_step3")
    convert(tmp_path, tmp_path / "again", "fp32")
    assert same_bytes(tmp_path / "out", tmp_path / "again", ["manifest.json"])


def test_weights_that_are_listed_and_are_not_there_are_named(run, tmp_path):
    copy = tmp_path / "copy"
    convert(saved(run), copy, "fp32", largest_file=50_000)
    (copy / "manifest.json").unlink()
    index = copy / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    name = said["weight_map"]["embedding.weight"]
    said["weight_map"]["another.weight"] = name
    index.write_text(json.dumps(said))
    assert f"{copy / name} lacks 'another.weight'" in refusal(copy, tmp_path / "out")


def test_what_is_there_is_not_overwritten(ours, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(UserError, match="is there already"):
        convert(ours, out, "fp32")
    assert [path.name for path in out.iterdir()] == ["something"]
    (out / "something").unlink()
    convert(ours, out, "fp32")  # an empty folder is as good as none
    assert not artifact.problems(artifact.read(out))


def test_what_is_made_meanwhile_is_not_replaced(ours, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make = conversion.make

    def make_and_more(folder, one):
        out.mkdir(exist_ok=True)
        (out / "another's").touch()
        return make(folder, one)

    monkeypatch.setattr(conversion, "make", make_and_more)
    with pytest.raises(UserError, match="is there already"):
        convert(ours, out, "fp32")
    assert [path.name for path in out.iterdir()] == ["another's"]


def test_two_conversions_into_one_folder_do_not_meet(ours, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make = conversion.make

    def make_after_another(folder, one):
        monkeypatch.setattr(conversion, "make", make)
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
            convert(ours, out, "fp32")
        return make(folder, one)

    monkeypatch.setattr(conversion, "make", make_after_another)
    convert(ours, out, "fp32")
    assert not artifact.problems(artifact.read(out))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_too_little_disk_is_said_before_the_first_byte(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert ": make room, or name a folder" in refusal(ours, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_had_is_said(run, ours, tmp_path):
    assert "Did you mean fp32?" in refusal(ours, tmp_path / "out", "fp31")
    assert "does not exist" in refusal(tmp_path / "none", tmp_path / "out")
    assert "holds no weights that are known" in refusal(run / "tokens" / "train", tmp_path / "out")
    assert "of kind 'tokens'" in refusal(run / "tokens", tmp_path / "out")
    assert f"such as {STEP}" in refusal(run / "coarse" / "checkpoints", tmp_path / "out")
    assert "holds no optimizer's state" in refusal(run / "coarse", tmp_path / "out", "universal")
    assert "--average goes with" in refusal(ours, tmp_path / "out", "universal", average=True)
    for file in (run / "coarse").glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    assert "keeps no average" in refusal(tmp_path / "model.safetensors", tmp_path / "out", average=True)
