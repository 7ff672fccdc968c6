"""What `stretto run --dry-run` prints: exactly what would be executed, as kept in tests/golden/dry_run_*.txt."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launcher import runner
from launcher.hosts import CROSSING
from launcher.recipe import load_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTFILE = "alpha slots=4  # the first\n\nbeta slots=4\n"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CROSSING):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not to be shown")
    monkeypatch.setattr(runner, "check_owner", lambda *_: None)


def dry_run(run: Path, hostfile: Path | None = None, *overrides: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert runner.run(load_recipe("quickstart", overrides), run, dry_run=True, console=console, hostfile=hostfile) == 0
    assert not run.exists()
    text = console.file.getvalue()
    text = text.replace(str(run), "RUN").replace(sys.executable, "PYTHON")
    text = text.replace(str(Path(sys.executable).with_name("deepspeed")), "DEEPSPEED")
    return re.sub(r"--master_port=2\d{4}\b", "--master_port=PORT", text)


def compare(name: str, text: str) -> None:
    path = GOLDEN / f"dry_run_{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.processes.gpus", lambda: ())
    compare("local", dry_run(tmp_path / "run"))


def test_on_this_machine_with_gpus_that_stages_share(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.processes.gpus", lambda: tuple("0123"))
    compare("gpus", dry_run(tmp_path / "run", None, "parallel=3"))


def test_on_hosts(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(HOSTFILE)
    keys = ["placement.semantic=1 node", "placement.coarse=2", "placement.fine=2", "stages.semantic.train.ranks=4"]
    text = dry_run(tmp_path / "run", hostfile, *keys, "stages.semantic.train.global_batch=32")
    assert "not to be shown" not in text
    compare("hosts", text)
