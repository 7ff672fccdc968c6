"""The learning rate over the steps of a training. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from trainer.config import TrainConfig

IMPROVEMENT = 1e-3
"""Share by which a validation loss must fall below the best for the plateau schedule to count it as better."""


class Schedule:
    """The share of the learning rate at each step (from 0), after a linear warm-up.

    * `constant`: all of it.
    * `linear`, `cosine`: down to `final_learning_rate` at the last step, in a line or a half cosine
      (Loshchilov & Hutter 2017).
    * `wsd`: all of it, then in a line down to `final_learning_rate` over the last `decay_steps`: warm-up, stable, decay
      (Hu et al. 2024, MiniCPM), so that a training can be made longer before it decays.
    * `plateau`: multiplied by `plateau_factor` whenever `plateau_patience` validations in a row were no better than the
      best before, down to `final_learning_rate`.

    Only `plateau` has a state. It is in every checkpoint.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._factor = 1.0
        self._best = math.inf
        self._waited = 0

    def factor(self, step: int) -> float:
        """Share of the learning rate at `step`."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        final = config.final_learning_rate
        if config.schedule == "plateau":
            return max(self._factor, final)
        if config.schedule == "constant":
            return 1.0
        start = config.steps - config.decay if config.schedule == "wsd" else config.warmup_steps
        progress = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
        if config.schedule == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (1 - final) * progress

    def observe(self, validation_loss: float) -> None:
        """Takes note of a validation. All ranks must be told the same loss."""
        if self.config.schedule != "plateau":
            return
        if validation_loss < self._best * (1 - IMPROVEMENT):
            self._best, self._waited = validation_loss, 0
            return
        self._waited += 1
        if self._waited >= self.config.plateau_patience:
            self._factor *= self.config.plateau_factor
            self._waited = 0

    def state_dict(self) -> dict[str, Any]:
        best = None if math.isinf(self._best) else self._best  # JSON has no infinity
        return {"factor": self._factor, "best": best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor, self._waited = state["factor"], state["waited"]
        self._best = math.inf if state["best"] is None else state["best"]
