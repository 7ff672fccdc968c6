"""`stretto doctor --hostfile` on real nodes, and what it makes of hosts that lack something."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from nodes import Cluster, nodes, skip_reason
from rich.console import Console

from launcher.doctor import Finding, print_findings, together
from launcher.host_checks import bandwidth_findings, clock_finding, missing_interfaces, port_findings, skew, ssh_finding
from launcher.host_network import Ports, rounds
from launcher.port_check import greet, listen, visit_all
from launcher.reach import ask_as_a_run

TRY_PORTS = """
import json, sys
from launcher.host_network import try_ports
print(json.dumps({name: told.visits for name, told in try_ports(json.loads(sys.argv[1])).items()}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := skip_reason():
        pytest.skip(reason)
    with nodes(tmp_path_factory.mktemp("cluster"), "alpha", "beta") as started:
        yield started


def test_hosts_and_what_is_between_them(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = cluster.hostfile(tmp_path / "hosts", {"alpha": 2, "beta": 2, "nowhere": 2})
    command = [sys.executable, "-m", "launcher", "doctor", "--hostfile", str(hostfile), "-o", str(tmp_path), "--json"]
    done = cluster.run("alpha", command, timeout=240)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert (told["host"], told["well"]) == ("alpha", False)
    assert "two ranks" in {check["name"] for check in told["checks"]}
    hosts = {host: {check["name"]: check for check in checks} for host, checks in told["hosts"].items()}
    assert list(hosts["nowhere"]) == ["ssh"]
    assert (hosts["nowhere"]["ssh"]["state"], "hostfile" in hosts["nowhere"]["ssh"]["remedy"]) == ("problem", True)
    for host, other in (("alpha", "beta"), ("beta", "alpha")):
        found = hosts[host]
        for name in ("ssh", "source", "versions", "slots", "run folder", "ports", "interface", "all-reduce"):
            assert found[name]["state"] == "ok", found[name]
        assert "eth0" in found["interface"]["found"]
        assert found["all-reduce"]["found"].endswith(f"B/s with {other}")
    assert hosts["beta"]["clock"]["state"] == "ok"
    assert {"memory", "shared memory", "disk", "open files", "gpus", "host name"} <= hosts["beta"].keys()
    assert cluster.left("alpha") == {}
    assert cluster.left("beta") == {}


def test_ports_that_a_host_may_not_use(cluster: Cluster) -> None:
    where = json.dumps({name: node.address for name, node in cluster.nodes.items()})
    assert (
        cluster.run("alpha", ["ip", "rule", "add", "ipproto", "tcp", "dport", "20000-29999", "prohibit"]).stderr == ""
    )
    try:
        done = cluster.run("alpha", [sys.executable, "-c", TRY_PORTS, where])
    finally:
        cluster.run("alpha", ["ip", "rule", "delete", "ipproto", "tcp", "dport", "20000-29999", "prohibit"])
    visits = json.loads(done.stdout)
    ((port, why),) = visits["alpha"]["beta"]["wrong"].items()
    assert 20_000 <= int(port) < 30_000
    assert why == "Permission denied"
    assert visits["beta"]["alpha"]["wrong"] == {}
    assert cluster.left("beta") == {}


def test_what_is_made_of_ports_and_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Ports([20_001, 40_001], ["32768", "60999"], ["lo", "eth0"], {"beta": {"interface": "eth0", "wrong": {}}})
    assert [finding.state for finding in port_findings("alpha", fine, "10.0.0.1", {})] == ["ok", "ok"]
    blocked = {"beta": {"interface": None, "wrong": {"20002": "timed out", "40002": "timed out"}}}
    (ports,) = port_findings("alpha", Ports([], [], ["eth0"], blocked), "10.0.0.1", {"beta": fine})
    assert ports.found == "cannot connect to beta, port 20002 and 40002: timed out"
    assert "20000 to 29999 and 32768 to 60999" in ports.remedy
    (ports,) = port_findings("alpha", None, "10.0.0.1", {})
    assert (ports.state, ports.found) == ("problem", "cannot listen at 10.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    _, interface = port_findings("alpha", fine, "10.0.0.1", {})
    assert (interface.state, interface.remedy) == ("problem", "Name one that all hosts have: eth0.")


@pytest.mark.parametrize(
    ("name", "value", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
        ("GLOO_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth", True),
        ("NCCL_SOCKET_IFNAME", "^docker0", False),
        ("NCCL_SOCKET_IFNAME", "ib", True),
    ],
)
def test_interfaces_that_a_host_does_not_have(name: str, value: str, missing: bool) -> None:
    assert missing_interfaces({name: value}, ["lo", "eth0"]) == (f"{name}={value}" if missing else "")


def test_another_machine_at_an_address_and_nobody_at_a_port() -> None:
    with listen("127.0.0.1", any_port=True) as one, listen("127.0.0.1") as none:
        threading.Thread(target=greet, args=(one, "alpha"), daemon=True).start()
        port, closed = one.getsockname()[1], none.getsockname()[1]
        none.close()
        others = {name: {"address": "127.0.0.1", "ports": [port]} for name in ("alpha", "beta")}
        told = visit_all({**others, "gamma": {"address": "127.0.0.1", "ports": [closed]}})
    assert told["alpha"] == {"interface": "lo", "wrong": {}}
    assert told["beta"]["wrong"] == {port: "another machine answers there ('alpha')"}
    assert told["gamma"]["wrong"] == {closed: "Connection refused"}


def test_the_clock_of_another_host() -> None:
    assert skew(100.0, 100.2, 100.5) == 0.0  # told between the question and the answer
    assert skew(100.0, 103.0, 100.5) == 2.5
    assert skew(100.0, 40.0, 100.5) == -60.0
    assert [clock_finding(ahead).state for ahead in (0.0, -0.9, 2.5, -2.5, 31.0, -60.0)] == [
        "ok", "ok", "warning", "warning", "problem", "problem",
    ]  # fmt: skip
    assert clock_finding(-60.0).found == "1 min behind this machine's"
    assert [ssh_finding(seconds).state for seconds in (0.3, 20)] == ["ok", "warning"]


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 64])
def test_pairs_to_measure(count: int) -> None:
    names = [f"node{number}" for number in range(count)]
    found = rounds(names)
    for pairs in found:
        busy = [name for pair in pairs for name in pair]
        assert len(busy) == len(set(busy))
    pairs_of_all = {frozenset(pair) for pairs in found for pair in pairs}
    assert set().union(*pairs_of_all) == set(names)
    assert len(pairs_of_all) == (count * (count - 1) // 2 if count <= 8 else 3 * (count // 2))


def test_a_slow_host_is_told_from_those_it_was_measured_with() -> None:
    fast, slow = 1.2e9, 0.1e9
    measured = {("a", "b"): fast, ("a", "c"): slow, ("b", "c"): slow, ("a", "d"): fast, ("b", "d"): fast}
    found = bandwidth_findings({**measured, ("c", "d"): "timed out"})
    assert {name: [one.state for one in findings] for name, findings in found.items()} == {
        "a": ["ok"], "b": ["ok"], "c": ["problem", "warning"], "d": ["problem", "ok"],
    }  # fmt: skip
    assert "100 MB/s" in found["c"][1].found
    assert "the median is 1.2 GB/s" in found["c"][1].found
    assert "does not add up numbers with d: timed out" in found["c"][0].found


def test_what_is_shown_of_hosts() -> None:
    fine, late = Finding("disk", "ok", "2 TB"), Finding("clock", "warning", "5 s behind", "Set it.")
    console = Console(file=io.StringIO(), width=80)
    hosts = {"alpha": [fine], "beta": [fine, late]}
    assert print_findings([fine], as_json=False, console=console, hosts=hosts)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.endswith(
        "2 hosts of the hostfile:\ndisk   ok  alpha, beta: 2 TB\nclock  warning  beta: 5 s behind\n       → Set it.\n"
    )
    many = {f"n{number}": [Finding("disk", "ok", f"{number} TB")] for number in range(20)}
    many["full"] = [Finding("disk", "problem", "full")]
    assert [finding.found for finding in together(many)] == ["20 hosts, such as n0: 0 TB", "full: full"]


def test_what_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    (tmp_path / "asleep.py").write_text(
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "Path('pids').write_text(f'{os.getpid()} {started.pid}')\ntime.sleep(1000)\n"
    )
    answer = ask_as_a_run(socket.gethostname(), str(tmp_path), "asleep", limit=8)
    assert "has not answered within 8 s" in answer.failure
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
