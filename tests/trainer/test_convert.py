"""Checkpoints of every ZeRO stage, number of ranks and precision, made into weights that others read."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from conversions import CELLS, RANKS, STEP, cell_name, load_universal, saved
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import holdings

from model import artifact
from model.errors import UserError
from trainer import convert as conversion
from trainer.convert import convert
from trainer.weights_kinds import tagged, weights_fingerprint

cells = pytest.mark.parametrize(("zero", "ranks", "precision"), CELLS)


@pytest.fixture
def run(trained):
    return trained / cell_name(2, 2, "bf16")


def moments(run, path):
    """The weights and moments of a run's checkpoint, whole and by shape, in one file."""
    shapes = {name: value.shape for name, value in load_file(run / "coarse" / "model.safetensors").items()}
    held = holdings(saved(run)).items()
    whole = {f"{kind} {name}": value.view(shapes[name]) for (kind, name), value in held if kind != "average"}
    save_file(whole, path)
    return path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bytes(one, other, besides=()):
    """Whether two folders hold the same files, but for those called `besides`."""
    found = [
        {name: value for name, value in contents(folder).items() if name not in besides} for folder in (one, other)
    ]
    return found[0] == found[1]


@cells
def test_whole_weights_are_those_of_the_training(trained, tmp_path, zero, ranks, precision):
    run = trained / cell_name(zero, ranks, precision)
    info = convert(saved(run), tmp_path / "fp32", "fp32")
    expected = load_file(run / "coarse" / "model.safetensors")
    found = load_file(tmp_path / "fp32" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert info["parameters"] == sum(value.numel() for value in expected.values())
    assert not artifact.problems(artifact.read(tmp_path / "fp32", "weights"))
    convert(saved(run), tmp_path / "average", "fp32", average=True)
    average, expected = (
        load_file(file) for file in (tmp_path / "average" / "model.safetensors", run / "coarse" / "average.safetensors")
    )
    assert all(torch.equal(average[name], expected[name]) for name in expected)


@cells
def test_deepspeeds_own_files_give_the_same_bytes(trained, tmp_path, zero, ranks, precision):
    """Of the very same training: whole weights, and the tensors of a universal checkpoint."""
    run = trained / cell_name(zero, ranks, precision)
    if zero == 0 and precision == "bf16":
        with pytest.raises(UserError, match="in 3 groups: which parameter is which cannot be told"):
            convert(run / "native", tmp_path / "native", "fp32")
        return
    for source, name in ((saved(run), "ours"), (run / "native", "native")):
        convert(source, tmp_path / name, "fp32")
        assert not any(tmp_path.glob(".*"))
    ours, native = (tmp_path / name / "model.safetensors" for name in ("ours", "native"))
    assert ours.read_bytes() == native.read_bytes()
    if zero:
        for source, name in ((saved(run), "ours"), (run / "native", "native")):
            convert(source, tmp_path / f"{name} universal", "universal")
        ours, native = (tagged(tmp_path / f"{name} universal") / "zero" for name in ("ours", "native"))
        (ours / "optimizer_state.pt").unlink()
        (native / "optimizer_state.pt").unlink()
        assert same_bytes(ours, native)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_plain_engine_of_any_zero_stage_loads_what_becomes_universal(trained, tmp_path, ranks):
    """On two ranks, whatever wrote it, with weights and moments to the bit."""
    cases = []
    for number, (zero, wrote, precision) in enumerate(cell for cell in CELLS if cell[1] == ranks):
        run = trained / cell_name(zero, wrote, precision)
        source = run / "native" if zero and number % 2 else saved(run)
        folder = tmp_path / run.name
        convert(source, folder, "universal")
        cases.append((folder, 1 + number % 3, precision, run, moments(run, tmp_path / f"{run.name}.safetensors")))
    run_ranks(load_universal, 2, tmp_path / "log", cases, timeout=200)


def test_a_universal_checkpoint_is_converted_again(run, tmp_path):
    convert(saved(run), tmp_path / "universal", "universal")
    convert(tmp_path / "universal", tmp_path / "again", "universal")
    convert(tmp_path / "universal", tmp_path / "fp32", "fp32")
    convert(saved(run), tmp_path / "direct", "fp32")
    assert (tmp_path / "fp32" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    assert same_bytes(tagged(tmp_path / "universal") / "zero", tagged(tmp_path / "again") / "zero")


def test_a_universal_checkpoint_holds_plain_tensors_alone(run, tmp_path):
    convert(saved(run), tmp_path / "universal", "universal")
    files = list((tmp_path / "universal").rglob("*.pt"))
    assert len(files) > 20
    for file in files:
        torch.load(file, weights_only=True)


def test_large_weights_are_split_as_transformers_reads_them(run, tmp_path):
    from transformers.modeling_utils import load_sharded_checkpoint

    from trainer.setup import StageSetup

    convert(saved(run), tmp_path / "fp32", "fp32", largest_file=50_000)
    index = json.loads((tmp_path / "fp32" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    expected = load_file(run / "coarse" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    model = StageSetup.read(run, "coarse").build_model()
    load_sharded_checkpoint(model, str(tmp_path / "fp32"), strict=True)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    convert(tmp_path / "fp32", tmp_path / "one", "fp32")
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == expected.keys()


def test_the_engines_checkpoint_is_taken_where_rounded_weights_lie_beside_it(run, tmp_path):
    """As transformers' trainer lays them out."""
    folder = shutil.copytree(run / "native", tmp_path / "native")
    expected = load_file(run / "coarse" / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in expected.items()}, folder / "model.safetensors")
    convert(folder, tmp_path / "fp32", "fp32")
    found = load_file(tmp_path / "fp32" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# What goes wrong


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


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


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


# Interruptions


def test_an_interrupted_conversion_goes_on_with_what_is_finished(ours, tmp_path, monkeypatch):
    convert(ours, tmp_path / "whole", "universal")
    made = []
    original = conversion.make

    def failing(folder, output):
        if len(made) == 20:
            raise KeyboardInterrupt
        made.append(output.name)
        return original(folder, output)

    monkeypatch.setattr(conversion, "make", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(ours, tmp_path / "out", "universal")
    assert not (tmp_path / "out").exists()
    first, made[:] = list(made), []
    flip(tmp_path / ".out.unfinished" / first[3], 700)  # what a crash of the machine may leave
    monkeypatch.setattr(conversion, "make", lambda folder, output: made.append(output.name) or original(folder, output))
    convert(ours, tmp_path / "out", "universal")
    assert set(first) & set(made) == {first[3]}
    assert same_bytes(tmp_path / "out", tmp_path / "whole")


def test_a_conversion_that_was_killed_when_all_was_done_is_finished(ours, tmp_path):
    convert(ours, tmp_path / "out", "fp32")
    (tmp_path / "out" / artifact.WORK).mkdir()
    convert(ours, tmp_path / "out", "fp32")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model.safetensors"]
