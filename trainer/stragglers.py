"""Which ranks hold the others up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median

log = logging.getLogger(__name__)


class Stragglers:
    """Names in the log each rank that needs more than `factor` times the median for its own part of a step, once when
    it starts to and once when it is over."""

    def __init__(self, factor: float, hosts: Sequence[str]) -> None:
        self.factor = factor
        self.hosts = hosts
        self.ranks: set[int] = set()
        """Those that are slow at present."""

    def observe(self, step: int, seconds: Sequence[float]) -> dict[int, float]:
        """Takes note of what each rank needed up to `step`; returns the slow ones, with their multiple of the
        median."""
        usual = median(seconds)
        slow = {rank: own / usual for rank, own in enumerate(seconds) if own > self.factor * usual}
        for rank in sorted(slow.keys() - self.ranks):
            log.warning(
                "straggler: rank %d on host %s needs %.3f s a step for its own part, %.1f times the median, at step %d",
                rank, self.hosts[rank], seconds[rank], slow[rank], step,
            )  # fmt: skip
        for rank in sorted(self.ranks - slow.keys()):
            log.info("rank %d on host %s keeps up again at step %d", rank, self.hosts[rank], step)
        self.ranks = set(slow)
        return slow
