"""Which jobs that have ended are started again, and when: by their exit code. docs/exit-codes.md has the table."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import NonNegativeFloat, NonNegativeInt

from model.config import Config
from trainer.exit_codes import DIVERGED, FAULT, HUNG, SAVED

LONGEST_PAUSE = 300.0
USER = 2
FINAL = (0, USER, DIVERGED)
"""Codes after which another attempt would end alike."""


class RestartsConfig(Config):
    """When a stage that has ended is started again by itself."""

    limit: NonNegativeInt = 3
    """Restarts in a row without a new checkpoint; one that makes a checkpoint starts the count afresh."""
    pause: NonNegativeFloat = 5.0
    """Seconds before the first of them; each further one waits twice as long, at most 5 minutes."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    """The exit code of the rank that failed first; negative, or above 128, for a signal."""
    lost: tuple[str, ...] = ()
    """Hosts that could no longer be reached."""


def restart_after(ended: Ended, failures: int, progressed: bool, config: RestartsConfig) -> float | None:
    """Seconds until a stage is started again, None where it is not.

    `failures` are the restarts in a row without a new checkpoint before this one, `progressed` says whether this
    attempt made one. A fault of the program (FAULT) is most likely to come again, so without a new checkpoint there is
    no second attempt.
    """
    if not ended.lost and (ended.code in FINAL or (ended.code == FAULT and not progressed)):
        return None
    if progressed:
        failures = 0
    if failures >= config.limit:
        return None
    if ended.lost:
        return 0.0  # the others are well, and the lost one is left out
    return min(LONGEST_PAUSE, config.pause * 2**failures)


def in_words(ended: Ended) -> str:
    """What has happened to a job that is started again."""
    if ended.lost:
        return f"{', '.join(ended.lost)} can no longer be reached"
    if ended.code == SAVED:
        return "it was told to stop by another, and saved"
    if ended.code == HUNG:
        return "it hung"
    return f"it ended with code {ended.code}"
