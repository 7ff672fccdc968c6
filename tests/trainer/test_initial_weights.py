"""Trainings that begin with weights from elsewhere."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from conversions import SETTINGS, SMALL, STEP, train_and_save
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file, save_file
from training_runs import change, holdings, job, log_of, make_run, reload, rows

from model import artifact
from trainer.convert import convert
from trainer.initial_weights import Matched
from trainer.saved_sources import open_saved


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(folder / "run", SMALL, **SETTINGS)
    run_ranks(train_and_save, 2, folder / "log", run)
    convert(run / "coarse" / "checkpoints" / STEP, folder / "fp32", "fp32")
    convert(run / "coarse" / "checkpoints" / STEP, folder / "universal", "universal")
    return folder


def expected(trained):
    return load_file(trained / "run" / "coarse" / "model.safetensors")


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_begins_with_the_weights_it_is_told_to(trained, tmp_path, zero, precision):
    """Whatever holds them; the average begins there too, and the moments at zero."""
    sources = [
        "fp32",
        "universal",
        "run/native",
        f"run/coarse/checkpoints/{STEP}",
        "run/coarse",
        "run/coarse/model.safetensors",
    ]
    source = sources[(2 * zero + (precision == "bf16")) % len(sources)]
    run = make_run(
        tmp_path / "run",
        SMALL,
        **{**SETTINGS, "init_from": str(trained / source)},
        zero=f"zero{zero}",
        precision=precision,
    )
    run_ranks(reload, 2, tmp_path / "log", run, tmp_path / "dump")
    held, weights = holdings(tmp_path / "dump" / "step-00000000"), expected(trained)
    assert {name for kind, name in held if kind == "weights"} == weights.keys()
    for (kind, name), value in held.items():
        if kind in ("weights", "average"):
            assert torch.equal(value, weights[name].flatten()), (kind, name)
        else:
            assert not value.any()
    (row,) = rows(run, "initial")
    assert row["parameters"] == len(weights)
    assert row["missing"] == row["unused"] == []
    assert row["other_shape"] == {}


def test_what_does_not_match_is_told_and_begins_afresh(trained, tmp_path):
    weights = expected(trained)
    fresh = make_run(tmp_path / "fresh", SMALL, **SETTINGS)
    run_ranks(reload, 1, tmp_path / "log", fresh, tmp_path / "fresh dump")
    name = sorted(weights)[-1]
    del weights[name]
    save_file({**weights, "heads": torch.zeros(1, 2, 3), "more": torch.zeros(2)}, tmp_path / "other.safetensors")
    run = make_run(tmp_path / "run", SMALL, **SETTINGS, init_from=str(tmp_path / "other.safetensors"))
    run_ranks(reload, 1, tmp_path / "log", run, tmp_path / "dump")
    held, before = (holdings(tmp_path / dump / "step-00000000") for dump in ("dump", "fresh dump"))
    assert torch.equal(held["weights", name], before["weights", name])
    assert torch.equal(held["weights", "heads"], before["weights", "heads"])
    assert torch.equal(held["weights", "embedding.weight"], weights["embedding.weight"].flatten())
    (row,) = rows(run, "initial")
    assert row["missing"] == [name]
    assert list(row["other_shape"]) == ["heads"]
    assert row["unused"] == ["more"]
    shapes = {key: tuple(value.shape) for key, value in expected(trained).items()}
    said = Matched.of(open_saved(tmp_path / "other.safetensors"), shapes).lines()
    assert said[0] == f"took {len(weights) - 1} of {len(weights) + 1} parameters from {tmp_path / 'other.safetensors'}"
    assert said[1] == f"1 are not there and begin afresh: {name}"
    assert "heads ([1, 2, 3] there, " in said[2]
    assert said[3] == "1 of those there are not used: more"


def refused(run, tmp_path):
    started = start_ranks(job, 2, tmp_path / "log", run)
    assert started.wait() == [2, 2], started.output()
    return started.output()


def test_weights_of_something_else_are_an_error(tmp_path):
    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    run = make_run(tmp_path / "run", SMALL, **SETTINGS, init_from=str(tmp_path / "other.safetensors"))
    said = refused(run, tmp_path)
    assert "none of the 1 parameters" in said
    assert "layer.weight" in said
    change(run, init_from=str(tmp_path / "none"))
    assert f"{tmp_path / 'none'} does not exist" in refused(run, tmp_path)


def job_on_a_host_of_its_own(run, hosts):
    """Each rank works in another folder, by way of which it sees other disks than the next one."""
    os.chdir(hosts / os.environ["RANK"])
    return job(run)


def test_hosts_that_see_other_weights_are_an_error(trained, tmp_path):
    for rank, weights in enumerate((expected(trained), {name: value + 1 for name, value in expected(trained).items()})):
        folder = tmp_path / str(rank) / "stage"
        shutil.copytree(trained / "run" / "coarse", folder, ignore=shutil.ignore_patterns("checkpoints", "logs"))
        save_file(weights, folder / "model.safetensors")
        found = artifact.read(folder)
        files = artifact.describe_files(folder, found.manifest["files"])
        artifact.seal(folder, found.kind, found.fingerprint, found.manifest["inputs"], found.info, files)
    run = make_run(tmp_path / "run", SMALL, **SETTINGS, init_from="/proc/self/cwd/stage")
    started = start_ranks(job_on_a_host_of_its_own, 2, tmp_path / "log", run, tmp_path)
    assert started.wait() == [2, 2], started.output()
    assert "/proc/self/cwd/stage is not the same on all hosts: put it on a disk that they share" in started.output()


def test_a_training_that_goes_on_does_not_look_at_them(trained, tmp_path):
    """They may be gone by then."""
    source = tmp_path / "fp32.safetensors"
    save_file(expected(trained), source)
    run = make_run(tmp_path / "run", SMALL, **SETTINGS, init_from=str(source))
    run_ranks(job, 1, tmp_path / "log", run)
    source.unlink()
    change(run, steps=6)
    (run / "coarse" / "manifest.json").unlink()
    run_ranks(job, 1, tmp_path / "log", run)
    assert "resumed at step 3" in log_of(run)
    assert len(rows(run, "initial")) == 1
