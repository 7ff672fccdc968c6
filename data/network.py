"""Which of a machine's networks the ranks on several nodes talk over. Imports no torch.

gloo would take the address its own host name stands for, which on many machines is that of loopback, and NCCL the first
interface it finds, which may lead to containers on the machine alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"
"""An address kept for documentation, on nobody's network: what it is reached by is what everything is by default."""


def use_interface() -> str | None:
    """Lets gloo and NCCL use the interface by which the job's master is reached. Returns its name.

    Where the job has one node, or the environment says what to use, or nothing is found, it changes nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    unset = [name for name in (GLOO, NCCL) if not os.environ.get(name)]
    chosen = choose_interface(os.environ["MASTER_ADDR"]) if unset else None
    for name in unset if chosen else ():
        os.environ[name] = f"={chosen}" if name == NCCL else f"{chosen}"  # NCCL takes all that begin so without =
    return chosen


def choose_interface(master: str) -> str | None:
    """The name of the network interface by which `master` is reached.

    On the master itself its name may stand for loopback: then the interface by which other machines are reached.
    """
    for target in (master, ELSEWHERE):
        for address in source_addresses(target):
            if not ipaddress.ip_address(address).is_loopback and (name := interface_of(address)):
                return name
    return None


def source_addresses(target: str) -> list[str]:
    """This machine's addresses that packets for `target` would come from. None is sent."""
    found = []
    with contextlib.suppress(socket.gaierror):
        for family, kind, protocol, _, address in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                found.append(probe.getsockname()[0])
    return found


def interface_of(address: str) -> str | None:
    """The interface that has `address`; psutil writes those of IPv6 with it: fe80::1%eth0."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address.partition("%")[0] == address for own in addresses):
            return name
    return None
