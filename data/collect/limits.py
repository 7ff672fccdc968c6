"""How much is asked of others, and how long it is waited for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    per_second: float = 1.0
    """Requests to one host."""
    connections: int = 4
    """At a time, over all hosts."""
    per_host: int = 2
    """Connections to one host."""
    largest: int = 2_000_000_000
    """Bytes of one file."""
    attempts: int = 5
    """For each address, where the next one may do better."""
    backoff: float = 1.0
    """Seconds until the second attempt; twice as many until each later one."""
    longest_wait: float = 900.0
    """Seconds. A server that asks for more is left for another time."""
    timeout: float = 60.0
    """Seconds without a byte."""
    slowest: float = 100.0
    """Bytes a second, over `timeout`: a connection that is slower is given up."""
