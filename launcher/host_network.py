"""What hosts reach of each other: ports, and how fast two of them add up numbers. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.hosts import module_on
from launcher.preflight import Report
from launcher.reach import ask_all, ask_as_a_run

PORTS_SECONDS = 60.0
ADD_UP_SECONDS = 150.0
"""Python with torch may come over a slow disk, and ranks that do not meet say so after a minute."""
ALL_PAIRS = 8
"""Hosts of which every two are measured."""
ROUNDS = 3
"""Of more hosts each is measured with so many, so that it shows which of two is slow."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Ports:
    """What a host says of itself and of its visits to the others (launcher.port_check)."""

    ports: list[int]
    range: list[str]
    """The first and the last port that its kernel gives to those who ask for any."""
    interfaces: list[str]
    visits: dict[str, dict[str, Any]]
    """By the names of others: `interface`, by which it was reached, and `wrong`: what is, by port."""


def try_ports(addresses: Mapping[str, str]) -> dict[str, Ports]:
    """Lets each host listen at its address and visit all others. Those that do not get so far are left out."""
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(_talking(name)) for name in addresses}
        limit = threading.Timer(PORTS_SECONDS, _kill, [started.values()])
        limit.start()
        stack.callback(limit.cancel)
        for name, process in started.items():
            _tell(process, {"name": name, "address": addresses[name]})
        said = {name: _hear(process) for name, process in started.items()}
        there = {name: {"address": addresses[name], "ports": told["ports"]} for name, told in said.items() if told}
        for name in there:
            _tell(started[name], {other: where for other, where in there.items() if other != name})
        visits = {name: _hear(started[name]) for name in there}
    return {name: Ports(**said[name], visits=told) for name, told in visits.items() if told is not None}


def _kill(processes: Iterable[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


@contextlib.contextmanager
def _talking(name: str) -> Iterator[subprocess.Popen[str]]:
    """The port check on a host, which ends when its input is closed."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        module_on(name, "launcher.port_check"), stdin=pipe, stdout=pipe, stderr=quiet, text=True
    ) as process:
        yield process


def _tell(process: subprocess.Popen[str], what: Any) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON, past what the start-up files of a shell print; None where none comes."""
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line)
    return None


def rounds(names: Sequence[str]) -> list[list[Pair]]:
    """Pairs of hosts, disjoint in each round: every two of a few hosts, each with some others of many."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found if len(names) <= ALL_PAIRS else found[:ROUNDS]


def add_up(
    pairs: Sequence[Pair], reports: Mapping[str, Report], addresses: Mapping[str, str], ports: Mapping[str, int]
) -> dict[Pair, float | str]:
    """Bytes a second at which two hosts add up numbers, each pair at once, or why they cannot. The first of a pair is
    met at its address and port."""
    backends = {pair: "nccl" if all(reports[name]["gpus"] for name in pair) else "gloo" for pair in pairs}
    arguments = {}
    for pair in pairs:
        where = [f"--address={addresses[pair[0]]}", f"--port={ports[pair[0]]}", f"--backend={backends[pair]}"]
        for rank, name in enumerate(pair):
            arguments[name] = [f"--rank={rank}", *where]
    answers = ask_all(
        arguments,
        lambda name: ask_as_a_run(
            name, reports[name]["place"], "launcher.all_reduce", *arguments[name], limit=ADD_UP_SECONDS
        ),
    )
    found: dict[Pair, float | str] = {}
    for pair in pairs:
        failures = [answers[name].failure or answers[name].said.get("error") for name in pair]
        said = answers[pair[0]].said
        found[pair] = next(filter(None, failures), None) or said["bytes"] / said["seconds"]
    return found
