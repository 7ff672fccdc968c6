"""What `stretto collect` shows while it works, and what it says at the end."""

from __future__ import annotations

from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from data.collect.collector import Outcome, collect
from data.collect.limits import Limits
from data.processes import plain_errors
from launcher.display import ConsoleProgress
from launcher.units import counted, size
from model.errors import UserError


def collect_files(
    manifest: Path, folder: Path, per_second: float, connections: int, largest: str, console: Console
) -> bool:
    """Fetches what a manifest names and says what came of it; returns whether all of it is there.

    Raises UserError, and KeyboardInterrupt after an interrupt, once everything is in order.
    """
    limits = Limits(per_second=per_second, connections=connections, largest=_bytes(largest))
    with plain_errors(folder), ConsoleProgress(console) as progress:
        outcome = collect(manifest, folder, limits, progress)
    _say(outcome, folder)
    if outcome.stopped:
        raise KeyboardInterrupt
    return not outcome.failures


def _bytes(text: str) -> int:
    try:
        found = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        found = ByteSize(0)
    if found <= 0:
        raise UserError(f"--largest is {text!r}: name a size such as 500MB or 2GB.")
    return found


def _say(outcome: Outcome, folder: Path) -> None:
    print(f"{folder}: {outcome.here:,} of {counted(outcome.addresses, 'file')}, {size(outcome.bytes)}.")
    failed = sum(outcome.failures.values())
    if failed:
        print(f"{failed:,} failed, listed in {folder / 'failed.jsonl'}; the same command tries them again:")
        for reason, count in outcome.failures.most_common():
            print(f"  {count:,} {reason}, such as {outcome.examples[reason]}")
    if outcome.stopped:
        print("The same command goes on with the others.")
    elif outcome.here:
        print(f"Train on it with data.audio={outcome.manifest}")
