"""Why an address was not fetched."""

from __future__ import annotations


class Failure(Exception):
    """It cannot be fetched. `reason` is the kind of fault, by which failures are counted; `detail` says it in words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Transient(Failure):
    """It may work in a while: after `wait` seconds where the server says so."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        super().__init__(reason, detail)
        self.wait = wait


class Stopped(Exception):
    """The whole collection is to stop: what is there of the file stays, for the next time."""
