"""The nodes that other tests run on are what they seem, and none outlives its test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT

ENDLESS = """
import os, sys
from pathlib import Path
from nodes import nodes

with nodes(Path(sys.argv[1]), "alpha") as cluster:
    process = cluster.popen("alpha", ["sleep", "1000"])
    while not cluster.processes("alpha"):
        pass
    print(cluster.nodes["alpha"].init, *cluster.processes("alpha"), flush=True)
    sys.stdin.read()
"""


def test_each_node_has_its_own_and_reaches_the_other(cluster):
    told = cluster.run("alpha", ["ssh", "beta", "hostname; hostname -I; touch /dev/shm/seen; ls ~"])
    assert told.stdout.split() == ["beta", cluster.nodes["beta"].address], told.stderr
    assert "seen" not in os.listdir("/dev/shm")
    assert cluster.run("alpha", ["ls", "/dev/shm"]).stdout == ""
    assert cluster.run("beta", ["ssh", "alpha", "hostname"]).stdout == "alpha\n"
    assert cluster.run("beta", ["sh", "-c", "exit 75"]).returncode == 75


def test_a_node_can_be_cut_off_and_returns(cluster):
    reach = ["ssh", "-o", "ConnectTimeout=2", "beta", "hostname"]
    cluster.cut("beta")
    assert cluster.run("alpha", reach).returncode == 255
    cluster.restore("beta")
    assert cluster.run("alpha", reach).stdout == "beta\n"


def test_a_process_gets_its_signals_and_is_seen_until_it_ends(cluster):
    process = cluster.popen("beta", ["sleep", "1000"])
    while not cluster.processes("beta"):
        assert process.poll() is None
    assert list(cluster.processes("beta").values()) == ["sleep 1000"]
    assert cluster.processes("alpha") == {}
    process.terminate()
    assert process.wait(10) == -15
    assert cluster.left("beta") == {}
    with pytest.raises(AssertionError, match="hung"):
        cluster.run("beta", ["sh", "-c", "sleep 1000 & sleep 1000"], timeout=1)
    assert cluster.left("beta") == {}


@pytest.mark.usefixtures("cluster")
def test_nodes_end_with_a_test_that_is_killed(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path / "killed")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        started = [int(number) for number in process.stdout.readline().split()]
        assert len(started) == 2
        process.kill()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(number) for number in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
