"""Checkpoints of every ZeRO stage, number of ranks and precision, made into weights that others read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversions import CELLS, RANKS, cell_name, flip, load_universal, same_bytes, saved
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import holdings

from model import artifact
from model.errors import UserError
from trainer import convert as conversion
from trainer.convert import convert
from trainer.weights_kinds import tagged

cells = pytest.mark.parametrize(("zero", "ranks", "precision"), CELLS)


@pytest.fixture
def run(trained):
    return trained / cell_name(2, 2, "bf16")


@pytest.fixture
def ours(run, tmp_path):
    return shutil.copytree(saved(run), tmp_path / "ours")


def moments(run, path):
    """The weights and moments of a run's checkpoint, whole and by shape, in one file."""
    shapes = {name: value.shape for name, value in load_file(run / "coarse" / "model.safetensors").items()}
    held = holdings(saved(run)).items()
    whole = {f"{kind} {name}": value.view(shapes[name]) for (kind, name), value in held if kind != "average"}
    save_file(whole, path)
    return path


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
