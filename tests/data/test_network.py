"""Ranks on two nodes find each other and share the data, whatever their hosts are called and however many each has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from training_runs import make_run

TIMEOUT = 120
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
CHOSEN = "from data.network import *; print(use_interface(), *map(os.environ.get, (GLOO, NCCL)))"
CLIPS = 50
READ = f"""
import sys
from pathlib import Path
from data.ranks import Ranks
from test_shards import reader_of

with Ranks.joined():
    ids = [row["id"] for row in reader_of(Path(sys.argv[1]), records={CLIPS}, batch=2)]
    Path(sys.argv[2]).write_text("\\n".join(ids))
"""


@pytest.fixture
def debian(cluster):
    """Nodes whose own names stand for loopback, as Debian sets them up."""
    for name, node in cluster.nodes.items():
        hosts = node.folder / "etc" / "hosts"
        hosts.write_text(f"127.0.1.1 {name}\n{hosts.read_text()}")
    return cluster


def chosen(cluster, node: str, master: str, **env: str) -> list[str]:
    """The interface that is chosen there, and what gloo and NCCL are told."""
    job = {"MASTER_ADDR": master, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **env}
    told = cluster.run(node, [sys.executable, "-c", CHOSEN], {**PATHS, **job})
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


def test_the_interface_that_leads_to_the_master_is_chosen(debian):
    assert chosen(debian, "beta", "alpha") == ["eth0", "eth0", "=eth0"]
    assert chosen(debian, "alpha", debian.nodes["alpha"].address) == ["eth0", "eth0", "=eth0"]
    assert chosen(debian, "alpha", "alpha") == ["eth0", "eth0", "=eth0"]
    assert chosen(debian, "beta", "nobody") == ["None"] * 3
    assert chosen(debian, "beta", "alpha", LOCAL_WORLD_SIZE="2") == ["None"] * 3


def test_what_the_user_has_set_wins(debian):
    assert chosen(debian, "beta", "alpha", GLOO_SOCKET_IFNAME="mine")[1:] == ["mine", "=eth0"]
    assert chosen(debian, "beta", "alpha", GLOO_SOCKET_IFNAME="a", NCCL_SOCKET_IFNAME="b") == ["None", "a", "b"]


def test_every_clip_is_read_once_where_nodes_have_unlike_numbers_of_ranks(debian, tmp_path):
    run = make_run(tmp_path / "run")
    job = {"MASTER_ADDR": debian.nodes["alpha"].address, "MASTER_PORT": "29500", "WORLD_SIZE": "3", **PATHS}
    started: list[subprocess.Popen] = []
    for rank, (node, local, ranks) in enumerate([("alpha", 0, 2), ("alpha", 1, 2), ("beta", 0, 1)]):
        own = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-c", READ, str(run / "tokens" / "train"), str(tmp_path / f"{rank}.txt")]
        started.append(debian.popen(node, command, {**job, **own}))
    assert [process.wait(TIMEOUT) for process in started] == [0, 0, 0]
    parts = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert {len(part) for part in parts} <= {16, 17, 18}
    assert {name for part in parts for name in part} == {f"clip-{number}" for number in range(CLIPS)}
    assert sum(map(len, parts)) <= CLIPS + 1
