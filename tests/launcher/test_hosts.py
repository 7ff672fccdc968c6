"""Hostfiles that are as they should be and that are not, and what is sent to a host."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from launcher.hosts import Host, crossing, module_on, on_host, read_hostfile
from model.errors import UserError


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_and_their_slots(tmp_path: Path) -> None:
    text = "# our cluster\n\nnode1 slots=8\n  10.0.0.2   slots = 4  # the old one\n"
    assert read_hostfile(hostfile(tmp_path, text)) == [Host("node1", 8), Host("10.0.0.2", 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# nothing but words\n\n", "names no host"),
        ("node1\n", "line 1: 'node1' is not such as `node1 slots=8`"),
        ("node1 slots=many\n", "line 1"),
        ("node1 slots=0\n", "has no slots"),
        ("node1 slots=8\nnode2 slots=8\nnode1 slots=8\n", "line 3: node1 is named twice"),
        ("node1 slots=20000\n", "has 20000 slots, more than 1024"),
        ("user@10.0.0.2 slots=8\n", "'user@10.0.0.2' holds @ or :"),
        ("fe80::1 slots=8\n", "(User, HostName) into ~/.ssh/config"),
        ("-oProxyCommand=evil slots=8\n", "is not such as"),
        ("-F/dev/null slots=8\n", "is not the name of a host"),
        ("localhost slots=8\nnode2 slots=8\n", f"cannot reach localhost; write {socket.gethostname()} instead"),
    ],
)
def test_a_hostfile_that_does_not_do(tmp_path: Path, text: str, said: str) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(UserError) as raised:
        read_hostfile(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_hostfile(hostfile(tmp_path, "node1\nnode2 slots=2\nnode2 slots=0\n"))
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_no_hostfile(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="hostfile"):
        read_hostfile(path)
    with pytest.raises(UserError, match="hostfile"):
        read_hostfile(tmp_path)


def test_what_a_shell_on_a_host_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRETTO_SSH", "ssh -F 'my config'")
    monkeypatch.setenv("PYTHONPATH", "/a path/$HOME")
    command = on_host("node1", ["echo", "$(touch /tmp/x); 'quoted'"])
    assert command[:3] == ["ssh", "-F", "my config"]
    assert "BatchMode=yes" in command
    assert command[-2] == "node1"
    words = shlex.split(command[-1])
    assert words == ["exec", "env", "PYTHONPATH=/a path/$HOME", "echo", "$(touch /tmp/x); 'quoted'"]


def test_this_machine_needs_no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRETTO_SSH", "no-such-ssh")
    for name in ("localhost", socket.gethostname()):
        assert module_on(name, "launcher.guard", "--x") == [sys.executable, "-m", "launcher.guard", "--x"]
    with pytest.raises(UserError, match=r"no-such-ssh is not installed.*STRETTO_SSH"):
        module_on("node1", "launcher.guard")


def test_an_ssh_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRETTO_SSH", "ssh 'x")
    with pytest.raises(UserError, match=r"STRETTO_SSH is .*ssh 'x.*no closing quotation"):
        module_on("node1", "launcher.guard")


def test_variables_that_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache", "AWS_ENDPOINT_URL": "http://x", "MINE": "1"}
    for name, value in {**wanted, "SECRET": "no", "SSH_CONNECTION": "no", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    crossed = crossing(["MINE"])
    assert wanted.items() <= crossed.items()
    assert not {"SECRET", "SSH_CONNECTION", "RANK", "HOME", "PATH"} & crossed.keys()
    assert crossed.items() <= os.environ.items()
