from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from launcher import cli

COMMANDS = (
    "run", "plan", "status", "logs", "stop", "inspect", "corpus", "collect", "fit", "tokenize", "train",
    "export", "convert", "export-transformers", "import-transformers", "import-quantizers", "generate", "doctor",
)  # fmt: skip


@pytest.fixture
def stretto(monkeypatch, capfd):
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stretto", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return caught.value.code or 0, output.out, output.err

    return call


def test_the_bare_command_shows_its_help(stretto):
    _, out, err = stretto()
    assert all(command in out + err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(stretto, command):
    code, out, _ = stretto(command, "--help")
    assert code == 0
    assert "Usage: stretto" in out


def test_the_version_is_shown(stretto):
    assert stretto("--version")[:2] == (0, f"stretto {version('stretto')}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run", "quickstrat"], "error: there is no recipe 'quickstrat'. Did you mean quickstart?"),
        (["run", "quickstart", "data.clipz=1"], "error: data.clipz is not a key of a recipe. Did you mean clips?"),
        (
            ["run", "quickstart", "--dry-run", "--only", "corups"],
            "error: there is no stage 'corups'. Did you mean corpus?",
        ),
        (["plan", "quickstart", "seed=x"], "error: seed is 'x': it must be a whole number."),
        (["status", "nowhere"], "error: nowhere is not a run folder"),
        (["logs", "nowhere"], "error: nowhere is not a run folder"),
        (["stop", "nowhere"], "error: nowhere is not a run folder"),
        (["train", "semantik", "--run", "nowhere"], "Did you mean semantic?"),
        (["fit", "codek", "--run", "nowhere"], "Did you mean codec?"),
        (["tokenize", "--run", "nowhere"], "error: nowhere is not a run folder"),
        (["export", "nowhere", "out"], "error: nowhere is not a run folder"),
        (["generate", "nowhere"], "error: name what to play"),
        (["generate", "nowhere", "a flute", "-o", "out.mp3"], "error: out.mp3: name a file that ends in .wav with -o."),
        (["import-quantizers", "out"], "error: name what to import: --semantic KMEANS.joblib, --conditioning RVQ.pt"),
        (["import-quantizers", "out", "--semantic", "file"], "error: file was not read as a k-means of scikit-learn"),
        (["import-quantizers", "out", "--conditioning", "file"], "error: conditioning: file is no checkpoint."),
        (["import-quantizers", "out", "--semantic", "gone"], "error: semantic: there is no file gone."),
        (["import-quantizers", ".", "--semantic", "file"], "error: . is there already: name a new folder"),
        (["corpus", "."], "error: . is there already: name a new folder"),
        (["collect", "list.csv", "-o", "out"], "error: list.csv cannot be read: No such file or directory."),
        (["collect", "file", "-o", "out"], "error: file: a manifest is a file that ends in .jsonl, .csv, .tsv."),
        (["collect", "list.csv"], "Missing option '--output'"),
        (["run", "quickstart", "-o", "file"], "error: file is a file: choose another folder with -o."),
        (["corpus", "file/corpus"], "Not a directory."),
    ],
)
def test_a_users_mistake_is_a_plain_line_and_exit_code_2(stretto, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, err = stretto(*arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_says_what_it_would_build_and_makes_nothing(stretto, tmp_path):
    code, out, _ = stretto("run", "quickstart", "-o", str(tmp_path / "run"), "--dry-run")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()][:2] == [["corpus", "build"], ["codec", "build"]]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_an_interrupt_does_not_pass_off_submitted_jobs_as_stopped(stretto, tmp_path, monkeypatch, cluster):
    def interrupted(*_) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.batch.run", interrupted)
    code, _, err = stretto("run", "quickstart", "-o", str(tmp_path / "run"), f"--{cluster}", "--wait")
    assert code == 130
    assert f"What was submitted goes on: `stretto stop {tmp_path / 'run'}` ends it." in err
    assert "Stopped" not in err


def test_imported_quantizers_say_how_a_recipe_uses_them(stretto, tmp_path):
    """The words printed are overrides, and a plan made with them has the imported codes."""
    save_file({f"layers.{level}._codebook.embed": 0.5**level * torch.randn(1, 32, 128) for level in range(4)},
              tmp_path / "rvq.safetensors")  # fmt: skip
    np.save(tmp_path / "kmeans.npy", np.random.default_rng(0).standard_normal((24, 92)))
    files = ["--semantic", str(tmp_path / "kmeans.npy"), "--conditioning", str(tmp_path / "rvq.safetensors")]
    code, out, _ = stretto("import-quantizers", str(tmp_path / "given"), *files)
    words = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert (code, len(words)) == (0, 7)
    assert "encoders.semantic.standardise=false" in words
    code, out, _ = stretto("inspect", str(tmp_path / "given"))
    assert (code, "4 × 32 × 128" in out, "measured" in out) == (0, True, False)
    code, out, _ = stretto("run", "quickstart", "-o", str(tmp_path / "run"), "--dry-run", *words)
    assert code == 0
    code, out, _ = stretto("plan", "quickstart", *words)
    assert (code, "4 × 32" in out, "1 × 24" in out) == (0, True, True)


def test_a_corpus_is_made_whole(stretto, tmp_path):
    folder = tmp_path / "corpus"
    code, out, _ = stretto("corpus", str(folder), "--clips", "16", "--seed", "3")
    assert (code, out) == (0, f"{folder}: 16 clips\n")
    assert stretto("inspect", str(folder))[0] == 0
    next((folder / "audio").iterdir()).unlink()
    assert stretto("inspect", str(folder))[0] == 1


def test_the_command_does_not_wait_for_torch(tmp_path):
    script = (
        "import sys; sys.argv = ['stretto', 'run', 'quickstart', '-o', sys.argv[1], '--dry-run']\n"
        "from launcher.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr
