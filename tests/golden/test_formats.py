"""What every earlier version wrote loads, here and on another user's machine: bundles, checkpoints, tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden.make_format import STEP, STEPS, WAYS, codes_of, logits_of, losses, train_stages
from helpers import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from small_bundle import PROMPTS
from training_runs import holdings

from data.progress import Progress
from data.token_corpus import TokenCorpus
from launcher.inspect import inspect
from model import MusicPipeline, artifact
from model.config import STAGES
from model.errors import UserError
from trainer.checkpoint_folder import step_name
from trainer.export import export_bundle

FORMATS = sorted(Path(__file__).parent.glob("format-*"))
formats = pytest.mark.parametrize("kept", FORMATS, ids=lambda folder: folder.name)


def test_there_is_one_of_each_version():
    assert [folder.name for folder in FORMATS] == [f"format-{n}" for n in range(1, artifact.FORMAT_VERSION + 1)]


@formats
def test_what_is_kept_is_whole(kept):
    for path in kept.rglob(artifact.MANIFEST):
        assert list(inspect(path.parent).all_problems()) == []


# Bundles


@formats
@pytest.mark.parametrize("way", WAYS)
def test_a_kept_bundle_makes_the_codes_it_made(kept, way):
    codes, expected = codes_of(kept / "bundle", **WAYS[way]), load_file(kept / "expected.safetensors")[f"codes.{way}"]
    assert torch.equal(codes, expected)
    assert not torch.equal(expected[0], expected[1])  # the prompts matter


@formats
def test_the_stages_of_a_kept_bundle_give_the_logits_they_gave(kept):
    expected = load_file(kept / "expected.safetensors")
    for name, logits in logits_of(kept / "bundle").items():
        assert expected[f"logits.{name}"].std() > 0.1
        assert (logits - expected[f"logits.{name}"]).abs().max() < 1e-4


ELSEWHERE = """
import json, sys
for name in ("deepspeed", "streaming"):
    sys.modules[name] = None  # importing it fails as if it were not installed
from model import MusicPipeline
pipeline = MusicPipeline.load("the bundle", "cpu", "fp32")
made = []
decode = pipeline.codec.decode
pipeline.codec.decode = lambda codes: made.append(codes.tolist()) or decode(codes)
music = pipeline.generate(json.loads(sys.argv[1]), seconds=1.6, **json.loads(sys.argv[2]))
print(json.dumps({"codes": made, "shape": list(music.waveform.shape), "loudest": float(music.waveform.abs().max())}))
"""


@formats
def test_a_bundle_of_another_user_elsewhere_makes_the_same_codes(kept, tmp_path):
    """A copy, its original gone, in a process with another home and neither DeepSpeed nor streaming installed."""
    shutil.copytree(kept / "bundle", tmp_path / "original")
    (tmp_path / "somewhere").mkdir()
    shutil.copytree(tmp_path / "original", tmp_path / "somewhere" / "the bundle")
    shutil.rmtree(tmp_path / "original")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "nobody"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for way, options in WAYS.items():
        result = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, json.dumps(PROMPTS), json.dumps(options)],
            cwd=tmp_path / "somewhere",
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        said = json.loads(result.stdout.splitlines()[-1])
        expected = load_file(kept / "expected.safetensors")[f"codes.{way}"]
        assert said["codes"] == [expected.tolist()]
        assert said["shape"] == [2, 25_600]
        assert 0.001 < said["loudest"] <= 1


# Checkpoints


@pytest.fixture(scope="module", params=FORMATS, ids=lambda folder: folder.name)
def resumed(request, tmp_path_factory):
    """The kept folder, a copy of its run that was trained to its end, and what was saved of it once it was loaded."""
    folder = tmp_path_factory.mktemp("resumed")
    run = shutil.copytree(request.param / "run", folder / "run")
    for name, part in (("codec", "codec"), ("embedding", "joint")):
        with artifact.create(run / name, name, name) as (partial, _):
            shutil.copytree(request.param / "bundle" / "encoders" / part, partial, dirs_exist_ok=True)
    run_ranks(train_stages, 1, folder / "log", run, folder / "loaded", timeout=300)
    return request.param, run, folder / "loaded"


def test_kept_weights_and_optimizer_states_are_taken_back_whole(resumed):
    kept, _, loaded = resumed
    for name in STAGES:
        before = holdings(kept / "run" / name / "checkpoints" / step_name(STEP))
        after = holdings(loaded / name / step_name(STEP))
        assert len({kind for kind, _ in before}) == 3  # the weights, and two moments of each
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_kept_training_goes_on_as_if_it_had_not_been_stopped(resumed):
    kept, run, _ = resumed
    expected = json.loads((kept / "losses.json").read_text())
    for name in STAGES:
        found = losses(run, name)
        assert list(found) == list(range(STEP + 1, STEPS + 1))
        assert found == pytest.approx({step: expected[name][str(step)] for step in found}, abs=1e-3)


def test_a_run_that_went_on_is_exported(resumed, tmp_path):
    _, run, _ = resumed
    with artifact.create(tmp_path / "bundle", "bundle", "0" * 16) as (folder, info):
        info.update(export_bundle(run, folder, Progress()))
    made = MusicPipeline.load(tmp_path / "bundle", "cpu").generate(["a slow flute"], seconds=1)
    assert made.waveform.isfinite().all()


# Later versions


def test_readers_refuse_what_a_later_version_wrote_in_words(tmp_path):
    kept = shutil.copytree(FORMATS[-1], tmp_path / "kept")
    later = artifact.FORMAT_VERSION + 1
    manifests = list(kept.rglob(artifact.MANIFEST))
    for path in manifests:
        artifact.write_json(path, {**json.loads(path.read_text()), "format_version": later})
    readers = [(path.parent.relative_to(kept).as_posix(), inspect) for path in manifests]
    readers += [
        ("bundle", MusicPipeline.load),
        ("run/tokens", TokenCorpus.read),
    ]
    words = f"has format version {later}; this Stretto reads up to {later - 1}: upgrade it"
    assert len(readers) > 6
    for place, read in readers:
        with pytest.raises(UserError, match=words):
            read(kept / place)
