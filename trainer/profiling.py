"""A trace of a few steps by torch's profiler, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from torch.profiler import profile

from trainer.callback import Callback
from trainer.engine import Engine
from trainer.setup import StageSetup
from trainer.training import Training

log = logging.getLogger(__name__)


class Profiling(Callback):
    """Traces the steps that `profile` names, on rank 0.

    One rank is enough: all do the same work and wait for each other in the same collectives, a trace has tens of
    megabytes, and stragglers are told by `trainer.stragglers`.
    """

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.steps = setup.config.train.profile if engine.rank == 0 else None
        self.path: Path = setup.folder / "profile" / "rank-0000.json"
        self._first = 0
        self._profiler: profile | None = None

    def before_step(self, training: Training) -> None:
        if self.steps and self._profiler is None and self.steps[0] <= training.step + 1 <= self.steps[1]:
            self._first = training.step + 1
            self._profiler = profile()
            self._profiler.start()

    def after_step(self, training: Training, losses: Tensor) -> None:
        if self.steps and self._profiler and training.step in (self.steps[1], training.config.steps):
            with training.aside():
                self._profiler.stop()
                self.path.parent.mkdir(exist_ok=True)
                self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None
            log.info("profile of steps %d to %d: %s", self._first, training.step, self.path)
