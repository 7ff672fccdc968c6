"""From a folder of audio to music, by the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import soundfile
from helpers import ROOT, run_command
from small_runs import CLIP, SMALL, caption_everything, music_folder

from model import artifact


def stretto(*arguments: object, timeout: float = 400, code: int = 0, **settings):
    result = run_command(["launcher", *map(str, arguments)], timeout=timeout, **settings)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A finished run on a folder of mixed audio with captions: (run folder, the command, its output)."""
    folder = tmp_path_factory.mktemp("captioned")
    audio = caption_everything(music_folder(folder / "music"))
    average = "stage_defaults.train.ema_decay=0.5"
    command = ["run", "quickstart", "-o", folder / "run", f"data.audio={audio}", average, *CLIP, *SMALL]
    return folder / "run", command, stretto(*command).stdout


def test_a_folder_of_audio_becomes_a_bundle_and_a_report(captioned):
    run, _, output = captioned
    assert artifact.problems(artifact.read(run / "bundle", "bundle")) == []
    assert str(run / "report.html") in output.replace("\n", "")
    report = json.loads((run / "report.json").read_text())
    assert report["corpus"]["clips"] == 24  # eight files of three clips each
    html = (run / "report.html").read_text()
    for name in ("silent.wav", "short.wav", "empty.wav", "noise.mp3", "gone.wav"):
        assert name in html
    assert "<audio" in html
    assert 'src="http' not in html
    assert list((run / "semantic" / "tensorboard").iterdir())


def test_the_average_of_the_weights_is_exported_on_request(captioned, tmp_path):
    run, _, _ = captioned
    stretto("export", run, tmp_path / "bundle", "--average")
    assert artifact.read(tmp_path / "bundle", "bundle").info["weights"]["average"]
    assert "moving averages" in (tmp_path / "bundle" / "README.md").read_text()
    average = (run / "coarse" / "average.safetensors").read_bytes()
    assert (tmp_path / "bundle" / "coarse.safetensors").read_bytes() == average
    assert (run / "bundle" / "coarse.safetensors").read_bytes() != average


def test_the_bundle_makes_music(captioned, tmp_path):
    run, _, _ = captioned
    arguments = ["generate", run / "bundle", "a calm tune", "--seconds", "3"]
    stretto(*arguments, "--seed", "7", "-o", tmp_path / "a.wav")
    stretto(*arguments, "--seed", "7", "-o", tmp_path / "b.wav")
    stretto(*arguments, "--seed", "8", "--cfg", "1.5", "--temperature", "1", "--top-k", "4", "-o", tmp_path / "c.wav")
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert len(wave) == 3 * rate
    assert abs(wave).max() > 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert (tmp_path / "a.wav").read_bytes() != (tmp_path / "c.wav").read_bytes()


def test_a_bundle_needs_nothing_else(captioned, tmp_path):
    """Averaged over checkpoints, in fewer bits, elsewhere, without the run, and without DeepSpeed or streaming."""
    run, _, _ = captioned
    stretto("export", run, tmp_path / "bundle", "--int8", "--dtype", "fp16", "--last", "2")
    options = {"dtype": "fp16", "int8": True, "average": False, "last": 2}
    assert artifact.read(tmp_path / "bundle", "bundle").info["weights"] == options
    for refused in (
        [tmp_path / "bundle"],
        [tmp_path / "b", "--average", "--last", "2"],
        [tmp_path / "b", "--last", "9"],
    ):
        assert "Traceback" not in stretto("export", run, *refused, code=2).stderr
    assert not (tmp_path / "b").exists()
    program = (
        "import sys; from model import MusicPipeline\n"
        f"samples = MusicPipeline.load({str(tmp_path / 'bundle')!r}).generate(['a tune'] * 2, seconds=1)\n"
        "assert samples.waveform.shape == (2, samples.sample_rate)\n"
        "assert not {'deepspeed', 'streaming'} & sys.modules.keys()\n"
        "print('made')"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "made\n", done.stderr
    assert not [path for path in (tmp_path / "bundle").rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".pth")]


def test_the_same_command_rebuilds_nothing_and_a_changed_key_what_depends_on_it(captioned):
    run, command, _ = captioned
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/manifest.json")}
    assert len(before) == 10
    output = stretto(*command, timeout=20).stdout
    assert "up to date" in output
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/manifest.json")} == before
    stretto(*command, "evaluation.prompts=2")
    changed = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"samples"}
    for single in (["fit", "codec"], ["tokenize"], ["train", "fine"]):
        assert "up to date" in stretto(*single, "--run", run).stdout
    dry = stretto(*command, "stages.fine.train.learning_rate=0.1", "--dry-run").stdout
    assert "stages.fine.train.learning_rate" in dry


def test_status_and_inspect_tell_of_a_finished_run(captioned):
    run, _, _ = captioned
    found = json.loads(stretto("status", run, "--json").stdout)
    assert {stage["state"] for stage in found["stages"]} == {"done"}
    for part in ("bundle", "tokens", "semantic", "quantizers"):
        assert "whole" in stretto("inspect", run / part).stdout


def test_without_captions_it_learns_from_audio_alone_and_says_what_that_means(tmp_path):
    audio = music_folder(tmp_path / "music")
    run = tmp_path / "run"
    # The three transformers train side by side here.
    output = stretto("run", "quickstart", "-o", run, f"data.audio={audio}", "parallel=3", *CLIP, *SMALL).stdout
    started = [output.index(f"{stage}: started") for stage in ("semantic", "coarse", "fine")]
    assert max(started) < min(output.index(f"{stage}: done") for stage in ("semantic", "coarse", "fine"))
    assert "no captions" in output
    assert "no captions" in (run / "report.html").read_text()
    assert "ema_decay" in stretto("export", run, tmp_path / "bundle", "--average", code=2).stderr
    assert not (tmp_path / "bundle").exists()
    refused = stretto("generate", run / "bundle", "a tune", "-o", tmp_path / "a.wav", code=2)
    assert "--like" in refused.stderr
    assert "Traceback" not in refused.stderr
    like = next(audio.glob("*.flac"))
    stretto("generate", run / "bundle", "--like", like, "--seconds", "2", "-o", tmp_path / "a.wav")
    assert soundfile.info(tmp_path / "a.wav").duration == pytest.approx(2)
