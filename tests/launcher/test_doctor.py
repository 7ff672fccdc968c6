"""`stretto doctor` on a machine that is well, and on ones that lack something."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from launcher import machine_checks as checks
from launcher.doctor import Finding, examine, print_findings
from launcher.host_report import describe_folder
from model.errors import UserError

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_this_machine_is_well(tmp_path: Path) -> None:
    """In what the tests themselves need; how much memory it has, say, is another matter."""
    findings = examine(tmp_path / "runs" / "new")
    needed = ("python", "packages", "compiler", "audio", "two ranks")
    assert [finding for finding in findings if finding.name in needed and finding.state != "ok"] == []
    found = {finding.name: finding.found for finding in findings}
    assert f"torch {torch.__version__}".split("+")[0] in found["packages"]
    assert "GB/s" in found["two ranks"]
    assert str(tmp_path) in found["disk"]


def shown(findings: list[Finding], as_json: bool = False) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=80)
    well = print_findings(findings, as_json, console)
    return well, console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_shown() -> None:
    fine, little = Finding("disk", "ok", "2 TB [free]"), Finding("memory", "warning", "1 GB is free", "Buy some.")
    wrong = Finding("gpus", "problem", "none", "Plug one in.")
    well, text = shown([fine, little])
    assert well
    assert text == "disk    ok  2 TB [free]\nmemory  warning  1 GB is free\n        → Buy some.\n"
    well, text = shown([fine, wrong], as_json=True)
    assert not well
    told = json.loads(text)
    assert (told["host"], told["well"]) == (socket.gethostname(), False)
    assert told["checks"][1] == {"name": "gpus", "state": "problem", "found": "none", "remedy": "Plug one in."}


def expect(result: checks.Result, state: str, found: str, remedy: str) -> None:
    assert result[0] == state, result
    assert found in result[1], result
    assert remedy in result[2], result


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.8.1")
    expect(checks.python(), "problem", "3.8.1", "make a virtual environment")


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = metadata.version

    def version(name: str) -> str:
        if name == "soxr":
            raise metadata.PackageNotFoundError
        return "4.0.0" if name == "transformers" else usual(name)

    monkeypatch.setattr(checks.metadata, "version", version)
    result = checks.packages()
    expect(result, "problem", "soxr is not installed", "pip install")
    assert "transformers is 4.0.0, not " in result[1]


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: 470.1\nGCC version: 9\n")
    monkeypatch.setattr(checks, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(checks, "visible_gpus", lambda: ("0", "1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expect(checks.gpus(), "problem", "2 here that torch cannot use; NVRM version: 470.1", "a newer driver")
    monkeypatch.setattr(torch.version, "cuda", None)
    expect(checks.gpus(), "problem", "is built without CUDA", "Install torch with CUDA")


@pytest.mark.parametrize(
    ("bf16", "nccl", "state"), [(True, True, "ok"), (False, True, "warning"), (True, False, "problem")]
)
def test_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch, bf16: bool, nccl: bool, state: str) -> None:
    monkeypatch.setattr(checks, "visible_gpus", lambda: ("0",))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    one = SimpleNamespace(name="H100", total_memory=80 * 10**9)
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", bf16)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: one)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 27, 5)))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    found = f"H100 (80 GB); CUDA 13.0, NCCL {'2.27.5' if nccl else 'none'}"
    expect(checks.gpus(), state, found, {"ok": "", "warning": "fp32", "problem": "need NCCL"}[state])


def test_gpus_that_are_named_wrongly_end_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("CUDA_VISIBLE_DEVICES is 'first'")

    monkeypatch.setattr(checks, "visible_gpus", refuse)
    expect(checks.gpus(), "problem", "CUDA_VISIBLE_DEVICES is 'first'", "unset it")
    assert checks.compiler()[0] != "problem"
    assert checks.attention()[0] == "ok"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None if name == "c++" else f"/bin/{name}")
    expect(checks.compiler(), "problem", "no c++", "build-essential")


def test_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: Usage(64 << 20, 0, 64 << 20))
    expect(checks.shared_memory(), "problem", "67.1 MB of 67.1 MB are free", "--shm-size")
    expect(checks.disk(tmp_path), "warning", "67.1 MB are free", "another disk")
    monkeypatch.setattr(checks.resource, "getrlimit", lambda what: (256, 1024))
    expect(checks.open_files(), "warning", "at most 256", "ulimit -n 1024")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    expect(checks.disk(tmp_path / "a" / "b"), "problem", f"{tmp_path} cannot be written: Permission denied", "another")


def test_a_disk_without_file_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    expect(checks.disk(tmp_path), "problem", f"the disk of {tmp_path} has no file locks", "mounted with flock")
    assert "file locks (flock)" in describe_folder(tmp_path, "")["refused"]


def test_a_name_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.1")  # of nobody, for documentation
    expect(checks.host_name(), "problem", "does not lead to this machine", "/etc/hosts")

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    expect(checks.host_name(), "problem", "Name or service not known", "GLOO_SOCKET_IFNAME")


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    expect(checks.two_ranks(), "problem", "they cannot talk", "launcher.all_reduce")

    def never(*command: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(checks.subprocess, "run", never)
    expect(checks.two_ranks(), "problem", "have not met", "firewall")


def test_audio_libraries_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    expect(checks.audio(), "problem", "PyAV cannot be loaded", "pip install --force av")


def test_the_cache_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models--laion--clap-htsat-unfused").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.fspath(tmp_path))
    expect(checks.hub_cache(), "ok", "holds laion/clap-htsat-unfused", "")
