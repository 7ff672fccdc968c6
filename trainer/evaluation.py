"""The loss on the validation windows, while a stage is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.fields import CONDITIONING
from model.stage import Batch
from trainer.batches import open_loader, to_device
from trainer.callback import Callback
from trainer.engine import Engine, MicroBatch
from trainer.setup import StageSetup
from trainer.training import Training


class Evaluation(Callback):
    """Validates at the start, every `validate_every` steps and at the end, and tells the schedule."""

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.engine = engine
        self.windows = open_loader(setup, "validation", engine.micro_batch, 0.0)
        # Whether captions would lead the stage as their audio does shows only in the stages that read the embedding.
        reads_text = setup.captions and CONDITIONING in setup.fields_used
        self.text = open_loader(setup, "validation", engine.micro_batch, 1.0) if reads_text else None

    def on_start(self, training: Training) -> None:
        if training.step == 0:
            self._validate(training)

    def after_step(self, training: Training, losses: Tensor) -> None:
        if training.due(training.config.validate_every):
            figures = self._validate(training)
            training.schedule.observe(figures["loss"])

    def _validate(self, training: Training) -> dict[str, Any]:
        with training.aside():
            figures = self.figures()
        training.validation = figures
        training.metrics.write("validation", training.step, **figures)
        return figures

    def figures(self) -> dict[str, Any]:
        """Loss on the windows as they are, with each condition taken from another window, and from text."""
        batches = [to_device(batch, self.engine.device) for batch in self.windows]
        quantizers = self._mean_loss(batches)
        conditions = [part.field for part in self.setup.config.model.conditions]
        shuffled = {
            field: float(self._mean_loss([self._shuffle(batch, field) for batch in batches]).mean())
            for field in dict.fromkeys(conditions)
        }
        figures: dict[str, Any] = {
            "loss": float(quantizers.mean()),
            "quantizers": quantizers.tolist(),
            "shuffled": shuffled,
        }
        if self.text is not None:
            text = self._mean_loss([to_device(batch, self.engine.device) for batch in self.text])
            figures["text"] = float(text.mean())
        return figures

    def _mean_loss(self, batches: list[MicroBatch]) -> Tensor:
        """Mean loss of each predicted quantizer over `batches` and ranks; packed batches count by their codes."""
        losses = torch.stack([self.engine.evaluate(batch) for batch in batches])
        return self.engine.mean((losses * self.engine.weights(batches)[:, None]).mean(dim=0))

    def _shuffle(self, batch: MicroBatch, field: str) -> MicroBatch:
        """`batch` with the condition `field` of each window taken from its neighbour; what is predicted stays."""
        if not isinstance(batch, list):
            return self._mislead(batch, field, batch[field].roll(1, dims=0))
        neighbours = [batch[-1], *batch[:-1]]
        return [self._mislead(window, field, other[field]) for window, other in zip(batch, neighbours, strict=True)]

    def _mislead(self, batch: Batch, field: str, other: Tensor) -> Batch:
        """`batch` with the codes `other` as its condition `field`: cut where they are longer, and repeated from their
        start where they are shorter."""
        own = batch[field]
        other = other[:, torch.arange(own.shape[1], device=own.device) % other.shape[1]]
        if field == self.setup.config.model.field:  # a stage may condition on other quantizers of what it predicts
            target = self.engine.module.quantizers
            other[..., target.start : target.stop] = own[..., target.start : target.stop]
        return {**batch, field: other}
