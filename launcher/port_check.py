"""`python -m launcher.port_check`: whether this host opens connections to others, and lets theirs in. Imports no torch.

It reads a line of JSON, `{"name", "address"}` of this host, listens there, and prints the ports; reads another, the
others' `{name: {"address", "ports"}}`, tries all of them, and prints what came of it. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from data.network import interface_of
from launcher.processes import PORTS

CONNECT_SECONDS = 5.0
AT_ONCE = 64
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where the kernel says which ports it gives to those who ask for any."""


def listen(address: str, any_port: bool = False) -> socket.socket:
    """A socket that listens on one of the ports at which ranks meet, or on any port, as they do to talk."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    choices = [0] if any_port else random.sample(PORTS, 100)
    for port in choices:
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, port))
            listening.listen()
        except OSError:
            listening.close()
            if port == choices[-1]:
                raise
        else:
            return listening
    raise AssertionError("the last choice returns or raises")


def greet(listening: socket.socket, name: str) -> None:
    """Tells all who come who is here, until it is closed."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.sendall(name.encode())


def visit(name: str, address: str, port: int) -> tuple[str | None, str | None]:
    """The network interface by which a host is reached, and what is wrong."""
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            interface = interface_of(connection.getsockname()[0])
            found = connection.makefile("rb").read().decode(errors="replace")
    except OSError as error:
        return None, error.strerror or str(error)
    return interface, None if found == name else f"another machine answers there ({found[:80]!r})"


def visit_all(others: dict[str, Any]) -> dict[str, Any]:
    """What came of visiting the others, at each of their ports."""
    calls = [(name, other["address"], port) for name, other in others.items() for port in other["ports"]]
    with ThreadPoolExecutor(max(1, min(len(calls), AT_ONCE))) as pool:
        ends = list(pool.map(lambda call: visit(*call), calls))
    told: dict[str, Any] = {name: {"interface": None, "wrong": {}} for name in others}
    for (name, _, port), (interface, wrong) in zip(calls, ends, strict=True):
        told[name]["interface"] = interface or told[name]["interface"]
        if wrong:
            told[name]["wrong"][port] = wrong
    return told


def main() -> int:
    me = json.loads(sys.stdin.readline())
    with listen(me["address"]) as meeting, listen(me["address"], any_port=True) as talking:
        for listening in (meeting, talking):
            threading.Thread(target=greet, args=(listening, me["name"]), daemon=True).start()
        ports = [listening.getsockname()[1] for listening in (meeting, talking)]
        told = {"ports": ports, "range": RANGE.read_text().split(), "interfaces": sorted(psutil.net_if_addrs())}
        print(json.dumps(told), flush=True)
        line = sys.stdin.readline()
        if line:
            print(json.dumps(visit_all(json.loads(line))), flush=True)
        sys.stdin.read()  # the others may still come
    return 0


if __name__ == "__main__":
    sys.exit(main())
