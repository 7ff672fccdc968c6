"""The training loop of one stage: from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.progress import Progress
from data.windows import DRAW, window_loader
from model import artifact
from model.dropping import Dropped, draw_dropped
from model.fields import CONDITIONING
from model.stage import Batch
from trainer.checkpoint import Checkpointer
from trainer.engine import Engine, MicroBatch, predicted_frames
from trainer.metrics import MetricsWriter
from trainer.setup import KIND, WEIGHTS, StageSetup

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A rank was told to stop; the state is saved and the same command goes on from it."""


class Training:
    """One stage on all ranks. Rank 0 alone writes metrics; every rank takes part in every save."""

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.config = setup.config.train
        self.engine = engine
        self.loader = self._loader("train", self.config.text_probability if setup.captions else 0.0, shuffle=True)
        self.validation = self._loader("validation", 0.0, shuffle=False)
        # Whether captions would lead the stage as their audio does shows only in the stages that read the embedding.
        reads_text = setup.captions and CONDITIONING in setup.fields_used
        self.text_validation = self._loader("validation", 1.0, shuffle=False) if reads_text else None
        self.checkpoints = Checkpointer(
            setup.folder / "checkpoints", setup.fingerprint, keep=self.config.keep_checkpoints
        )
        self.step = 0
        self.stopping = False
        self._logged = time.monotonic(), 0
        self._frames = 0  # that this rank has trained on since the last log line

    def _loader(self, split: str, text_probability: float, shuffle: bool) -> Any:
        return window_loader(
            self.setup.tokens,
            split,
            self.setup.fields_used,
            self.setup.config.model.window_seconds,
            batch=self.engine.micro_batch,
            seed=self.setup.seed,
            global_batch=self.config.global_batch if shuffle else None,
            text_probability=text_probability,
            workers=self.config.workers if shuffle else 0,
            shuffle=shuffle,
            packed=self.config.packing,
        )

    def run(self) -> None:
        """Trains to the last step and writes the weights. Raises Interrupted after saving when told to stop."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._stop)
        self._resume()
        metrics = None
        if self.engine.rank == 0:
            progress = Progress(self.setup.run / "progress" / f"{self.setup.stage}.json")
            metrics = MetricsWriter(self.setup.folder, self.step, self.config.steps, progress)
            metrics.show(self.step)
        batches = self._batches()
        if self.step == 0:
            self._validate(metrics)
        self._logged = time.monotonic(), self.step
        while self.step < self.config.steps:
            losses = self.engine.train_step([self._draw(batches) for _ in range(self.engine.accumulation)])
            self.step += 1
            self._after_step(losses, metrics)
        self._write_weights()
        if metrics:
            metrics.close()

    def _after_step(self, losses: Tensor, metrics: MetricsWriter | None) -> None:
        """Whatever is due at this step: a log line, a validation, a checkpoint, the end."""
        last = self.step == self.config.steps
        if self.step % self.config.log_every == 0 or last:
            self._log(losses, metrics)
        if self.step % self.config.validate_every == 0 or last:
            self._validate(metrics)
        stop = self.engine.any(self.stopping)
        if self.step % self.config.checkpoint_every == 0 or last or stop:
            self._save()
        if stop and not last:
            raise Interrupted(f"stopped at step {self.step} of {self.config.steps}")

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def _batches(self) -> Iterator[MicroBatch]:
        """Batches without end: epoch after epoch, from where the loader was left."""
        while True:
            yield from self.loader

    def _draw(self, batches: Iterator[MicroBatch]) -> tuple[MicroBatch, Dropped | list[Dropped]]:
        """The next micro batch, and what its windows do without: a pure function of (seed, epoch, clip)."""
        batch = next(batches)
        self._frames += predicted_frames(batch, self.setup.config.model.field)
        dropped = [self._dropped(window) for window in batch] if isinstance(batch, list) else self._dropped(batch)
        return self._to_device(batch), dropped

    def _dropped(self, window: Batch) -> Dropped:
        _, frames, quantizers = self._checked(window)
        return draw_dropped(self.setup.config.model, window[DRAW], frames, quantizers).to(self.engine.device)

    def _checked(self, window: Batch) -> torch.Size:
        """The shape of the codes to predict, all codes looked at while they are in host memory."""
        shape = self.engine.module.own_codes(window).shape
        self.engine.module.check(window, shape[1])
        return shape

    def _to_device(self, batch: MicroBatch) -> MicroBatch:
        def moved(window: Batch) -> Batch:
            return {name: codes.to(self.engine.device, non_blocking=True) for name, codes in window.items()}

        return [moved(window) for window in batch] if isinstance(batch, list) else moved(batch)

    def _log(self, losses: Tensor, metrics: MetricsWriter | None) -> None:
        loss = float(self.engine.mean(losses.mean()))
        frames = float(self.engine.mean(torch.tensor(self._frames, device=self.engine.device))) * self.engine.world_size
        self._frames = 0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of stage {self.setup.stage!r} is {loss} at step {self.step}: "
                f"lower stages.{self.setup.stage}.train.learning_rate; the last good checkpoint is kept."
            )
        if metrics is None:
            return
        now, (then, step_then) = time.monotonic(), self._logged
        seconds = max(now - then, 1e-9)
        self._logged = now, self.step
        metrics.write(
            "train",
            self.step,
            loss=loss,
            learning_rate=self.engine.learning_rate,
            gradient_norm=self.engine.gradient_norm(),
            windows_per_second=(self.step - step_then) * self.config.global_batch / seconds,
            tokens_per_second=frames * len(self.engine.module.quantizers) / seconds,
        )
        metrics.show(self.step, loss)

    def _validate(self, metrics: MetricsWriter | None) -> None:
        """Loss on the validation windows as they are, with each condition taken from another window, and from text."""
        started = time.monotonic()
        batches = [self._to_device(batch) for batch in self.validation]
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
        if self.text_validation is not None:
            text = self._mean_loss([self._to_device(batch) for batch in self.text_validation])
            figures["text"] = float(text.mean())
        if metrics:
            metrics.write("validation", self.step, **figures)
        then, step_then = self._logged
        self._logged = then + time.monotonic() - started, step_then  # validation does not count as training time

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

    def _resume(self) -> None:
        found = self.checkpoints.load_newest(self.engine)
        if found is None:
            return
        self.step, state = found
        self.loader.load_state_dict(state["loader"])
        if self.engine.rank == 0:
            log.info("resumed at step %d of %d", self.step, self.config.steps)

    def _save(self) -> None:
        started = time.monotonic()
        self.checkpoints.save(self.engine, self.step, {"loader": self.loader.state_dict()})
        then, step_then = self._logged
        self._logged = then + time.monotonic() - started, step_then

    def _write_weights(self) -> None:
        """The finished stage: its fp32 weights and a manifest, which makes the folder an artifact."""
        weights = {name: value for name, value in self.engine.full_weights() if self.engine.rank == 0}
        if self.engine.rank == 0:
            partial = self.setup.folder / f".{WEIGHTS}{artifact.PARTIAL}"
            save_file(weights, partial)
            partial.replace(self.setup.folder / WEIGHTS)
            info = {
                "steps": self.step,
                "parameters": sum(value.numel() for value in weights.values()),
                "model": self.setup.config.model.model_dump(mode="json"),
            }
            artifact.write_manifest(self.setup.folder, KIND, self.setup.fingerprint, info=info, names=[WEIGHTS])
        self.engine.barrier()
