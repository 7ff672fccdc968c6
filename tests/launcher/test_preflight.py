"""What is said before a run of hosts that do not work together, on real nodes where it takes ssh."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from nodes import Cluster, nodes, skip_reason

from launcher.host_report import report, source_digest
from launcher.hosts import Host
from launcher.preflight import amiss, missing_gpus, returned
from launcher.reach import why

CHECK = """
import json, sys
from pathlib import Path
from data.processes import plain_errors
from launcher.hosts import read_hostfile
from launcher.preflight import check_hosts

with plain_errors():
    print(json.dumps(check_hosts(read_hostfile(Path(sys.argv[1])), Path(sys.argv[2]))))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := skip_reason():
        pytest.skip(reason)
    with nodes(tmp_path_factory.mktemp("cluster"), "alpha", "beta", "gamma") as started:
        yield started


def check(cluster: Cluster, run: Path, names: Sequence[str], at: str = "alpha") -> list[str]:
    """What is said at a node of the hosts with these names."""
    hostfile = cluster.hostfile(cluster.folder / "hosts", dict.fromkeys(names, 2))
    done = cluster.run(at, [sys.executable, "-c", CHECK, str(hostfile), str(run)])
    assert done.returncode == (0 if done.stdout else 2), done.stderr
    return [done.stdout or "", *done.stderr.splitlines()]


@contextlib.contextmanager
def written(path: Path, text: str) -> Iterator[None]:
    """Another text in a file that the nodes keep."""
    usual = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(usual)


@contextlib.contextmanager
def mounted(cluster: Cluster, node: str, place: Path, *options: str) -> Iterator[None]:
    """Something else at `place` on one node."""
    assert cluster.run(node, ["mount", *options, str(place)]).returncode == 0
    try:
        yield
    finally:
        assert cluster.run(node, ["umount", str(place)]).returncode == 0


def test_hosts_that_are_well_and_where_they_are(cluster: Cluster, tmp_path: Path) -> None:
    known = {name: node.address for name, node in cluster.nodes.items()}
    run = tmp_path / "runs" / "new"
    assert json.loads(check(cluster, run, ["alpha", "beta", "gamma"])[0]) == known
    from_outside = json.loads(check(cluster, run, ["beta", "gamma"])[0])
    assert from_outside == {name: known[name] for name in ("beta", "gamma")}
    assert json.loads(check(cluster, run, ["alpha"])[0]) == {"alpha": "127.0.0.1"}
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_with_hosts_is_said_at_once(cluster: Cluster, tmp_path: Path) -> None:
    changed = tmp_path / "ds_configs"
    shutil.copytree(ROOT / "ds_configs", changed)
    (changed / "zero1.json").write_text("{}")
    numpy = next(path for path in metadata.files("numpy") or [] if path.name == "METADATA").locate()
    older = tmp_path / "METADATA"
    older.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.0\n")
    run = tmp_path / "run"
    run.mkdir()
    known = cluster.nodes["alpha"].home / ".ssh" / "known_hosts"
    without_gamma = "".join(line for line in known.read_text().splitlines(True) if not line.startswith("gamma"))
    with (
        written(known, without_gamma),
        mounted(cluster, "beta", ROOT / "ds_configs", "--bind", str(changed)),
        mounted(cluster, "beta", Path(str(numpy)), "--bind", str(older)),
        mounted(cluster, "beta", run, "-t", "tmpfs", "tmpfs"),
    ):
        said = check(cluster, run, ["alpha", "beta", "gamma", "delta"])
    wanted = {
        "beta: its Stretto is not the one here": "Install the same",
        f"beta: numpy is 1.26.0 there and {metadata.version('numpy')} here": "Install the same",
        f"beta: its {run} is not the one here": "mount its disk",
        "gamma cannot be reached: its ssh key is not in": f"ssh-keyscan gamma >> {known}",
        "delta cannot be reached: ssh: Could not resolve hostname delta": "in the hostfile",
    }
    assert len([line for line in said if line]) == len(wanted)
    for found, remedy in wanted.items():
        assert any(found in line and remedy in line for line in said), (found, said)


def test_a_key_that_has_changed(cluster: Cluster, tmp_path: Path) -> None:
    known = cluster.nodes["alpha"].home / ".ssh" / "known_hosts"
    another = (cluster.nodes["gamma"].folder / "etc" / "host_key.pub").read_text()
    with written(known, f"beta {another}"):
        _, said = check(cluster, tmp_path, ["beta"])
    assert "beta cannot be reached: its ssh key is not the one that is known" in said
    assert f'ssh-keygen -f "{known}" -R "beta"' in said


def test_a_folder_that_is_missing_or_read_only(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "parent" / "run"
    run.mkdir(parents=True)
    with mounted(cluster, "beta", run.parent, "-t", "tmpfs", "tmpfs"):
        _, said = check(cluster, run, ["alpha", "beta"])
    assert f"beta: it has no {run}" in said
    with mounted(cluster, "beta", run, "--bind", str(run)):
        cluster.run("beta", ["mount", "-o", "remount,bind,ro", str(run)])
        _, said = check(cluster, run, ["alpha", "beta"])
    assert f"beta: it cannot write {run}: Read-only file system" in said


def test_one_machine_by_two_names_and_nobody_let_in(cluster: Cluster, tmp_path: Path) -> None:
    address = cluster.nodes["beta"].address
    _, said = check(cluster, tmp_path, ["beta", address])
    assert f"beta and {address} are the same machine" in said
    keys = cluster.nodes["beta"].home / ".ssh" / "authorized_keys"
    with written(keys, ""):
        _, said = check(cluster, tmp_path, ["alpha", "beta"])
    assert "beta lets nobody in from here without a password" in said
    assert "ssh-copy-id beta" in said


def changed(told: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**told, **changes}


def test_slots_that_are_more_than_the_gpus(tmp_path: Path) -> None:
    own = report(tmp_path)
    eight, none = changed(own, gpus=8), changed(own, gpus=0)
    assert amiss(Host("beta", 8), eight, own) == []
    assert amiss(Host("beta", 100), none, own) == []  # processes, where there are no GPUs
    (line,) = amiss(Host("beta", 9), eight, own)
    assert line == "beta: it has 8 GPUs, but the hostfile says slots=9. Write slots=8."
    reports = {"beta": eight, "gamma": none}
    assert list(missing_gpus("beta", reports)) == []
    ((found, _),) = missing_gpus("gamma", reports)
    assert found == "it has no GPU, and beta has"


def test_a_host_that_answers_again(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    own = report(tmp_path, "recipe.yaml")
    host = Host("beta", 1)
    assert returned(host, json.dumps(own), own) == []
    assert returned(host, f"Welcome to beta!\n{json.dumps(own)}\n", own) == []  # by the start-up files of its shell
    rebooted = report(tmp_path / "not-mounted", "recipe.yaml")
    assert "must share the run folder" in returned(host, json.dumps(rebooted), own)[0]
    updated = changed(own, code="0123", packages={**own["packages"], "torch": "9.9"})
    assert [line.split(":")[0] for line in returned(host, json.dumps(updated), own)] == ["beta", "beta"]
    assert "Stretto" in returned(host, json.dumps({"host": "beta"}), own)[0]
    assert "has not said" in returned(host, "", own)[0]


def test_the_digest_is_that_of_the_source(tmp_path: Path) -> None:
    for name in ("model/a.py", "launcher/recipes/b.yaml", "data/__pycache__/c.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "data/__pycache__/c.pyc").unlink()
    (tmp_path / "model" / "__pycache__").mkdir()
    assert source_digest(tmp_path) == before
    (tmp_path / "launcher/recipes/b.yaml").rename(tmp_path / "launcher/recipes/c.yaml")
    assert source_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("code", "errors", "found", "remedy"),
    [
        (127, "env: '/venv/bin/python': No such file", f"has no {sys.executable}", "at the same place"),
        (1, "/venv/bin/python: No module named launcher.host_report", "has no Stretto", "Install it"),
        (1, "/venv/bin/python: Error while finding module ...\nNo module named 'launcher'", "no Stretto", "Install it"),
        (1, "Traceback\nImportError: No module named 'psutil'.", "'psutil' (exit code 1)", "there and see"),
        (255, "ssh: connect to host beta port 22: Connection refused", "Connection refused", "Start sshd"),
        (255, "ssh: connect to host beta port 22: Connection timed out", "timed out", "firewall"),
        (255, "Connection closed by 10.0.0.1 port 22", "Connection closed", "`ssh beta` must work"),
    ],
)
def test_why_a_host_has_said_nothing(code: int, errors: str, found: str, remedy: str) -> None:
    told = why("beta", "launcher.host_report", code, errors)
    assert found in told[0]
    assert remedy in told[1]
