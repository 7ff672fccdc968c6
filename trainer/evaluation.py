"""How well a stage predicts the validation windows, while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.windows import WindowLoader
from model.errors import UserError, nearest
from model.fields import CONDITIONING
from model.stage import Batch
from trainer.batches import open_loader, to_device
from trainer.callback import Callback
from trainer.engine import Engine, MicroBatch, predicted_frames
from trainer.setup import StageSetup
from trainer.training import Training


class Evaluation(Callback):
    """Validates at the start, every `validate_every` steps and at the end, and tells the schedule.

    Raises UserError where the recipe keeps the best checkpoint by a figure that there is not.
    """

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.engine = engine
        self.field = setup.config.model.field
        self.windows = open_loader(setup, "validation", engine.micro_batch, 0.0)
        # Whether captions would lead the stage as their audio does shows only in the stages that read the embedding.
        reads_text = setup.captions and CONDITIONING in setup.fields_used
        self.text = open_loader(setup, "validation", engine.micro_batch, 1.0) if reads_text else None
        self._check_keep_best(["loss", "perplexity", *(["text"] if reads_text else [])])

    def _check_keep_best(self, names: list[str]) -> None:
        asked = self.setup.config.train.keep_best
        if asked is not None and asked not in names:
            raise UserError(
                f"stages.{self.setup.stage}.train.keep_best is {asked!r}: no figure of the validation that is best "
                f"where it is lowest has that name.{nearest(asked, names)} Choose {', '.join(names)}."
            )

    def on_start(self, training: Training) -> None:
        if training.step == 0:
            self._validate(training)

    def after_step(self, training: Training, losses: Tensor) -> None:
        if training.due(training.config.validate_every):
            figures = self._validate(training)
            training.schedule.observe(figures["loss"])

    def _validate(self, training: Training) -> dict[str, Any]:
        with training.aside():
            figures = self.figures(lambda: training.beat("validating"))
        training.validation = figures
        training.metrics.write("validation", training.step, **figures)
        return figures

    def figures(self, beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What a row of the metrics says: the figures on the windows as they are, of all predicted quantizers and of
        each, the loss with each condition taken from another window, and the loss with text for audio.

        `beat` is called before each batch.
        """
        misled = list(dict.fromkeys(part.field for part in self.setup.config.model.conditions))
        means = self._means(
            beat,
            self.windows,
            lambda batch, before: [batch, *(self._shuffle(batch, before, field) for field in misled)],
        )
        own = means[0]
        figures = {
            **scores(own.mean(dim=1)),
            "quantizers": own[0].tolist(),
            self.field: {
                str(quantizer): scores(values)
                for quantizer, values in zip(self.engine.module.quantizers, own.unbind(dim=1), strict=True)
            },
            "shuffled": dict(zip(misled, means[1:, 0].mean(dim=1).tolist(), strict=True)),
        }
        if self.text is not None:
            figures["text"] = float(self._means(beat, self.text, lambda batch, before: [batch])[0, 0].mean())
        return figures

    def _means(
        self,
        beat: Callable[[], None],
        windows: WindowLoader,
        variants: Callable[[MicroBatch, MicroBatch], list[MicroBatch]],
    ) -> Tensor:
        """Mean loss and accuracy of each predicted quantizer over all codes of `windows`, over all ranks, for each of
        the `variants` of a batch, given the one before it: `[variants, 2, quantizers]`, on the host."""
        total, count = torch.zeros((), device=self.engine.device), torch.zeros((), device=self.engine.device)
        before = None
        for loaded in windows:
            beat()
            batch = to_device(loaded, self.engine.device)
            frames = predicted_frames(batch, self.field)
            found = torch.stack([self.engine.evaluate(one) for one in variants(batch, before or batch)])
            total, count = total + found * frames, count + frames
            before = batch
        return (self.engine.mean(total) / self.engine.mean(count)).cpu()

    def _shuffle(self, batch: MicroBatch, before: MicroBatch, field: str) -> MicroBatch:
        """`batch` with the condition `field` of each window taken from the window before; what is predicted stays."""
        if isinstance(batch, list):
            assert isinstance(before, list)
            others = [before[-1], *batch[:-1]]
            return [self._mislead(window, field, other[field]) for window, other in zip(batch, others, strict=True)]
        assert not isinstance(before, list)
        return self._mislead(batch, field, torch.cat([before[field][-1:], batch[field][:-1]]))

    def _mislead(self, batch: Batch, field: str, other: Tensor) -> Batch:
        """`batch` with the codes `other` as its condition `field`: cut where they are longer, and repeated from their
        start where they are shorter."""
        own = batch[field]
        other = other[:, torch.arange(own.shape[1], device=own.device) % other.shape[1]]
        if field == self.field:  # a stage may condition on other quantizers of what it predicts
            target = self.engine.module.quantizers
            other[..., target.start : target.stop] = own[..., target.start : target.stop]
        return {**batch, field: other}


def scores(loss_and_accuracy: Tensor) -> dict[str, float]:
    """The figures of `[2]`, a mean loss and an accuracy."""
    loss, accuracy = loss_and_accuracy
    return {"loss": float(loss), "perplexity": float(loss.exp()), "accuracy": float(accuracy)}
