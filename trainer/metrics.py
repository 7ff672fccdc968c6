"""The figures of training: how well it learns, how fast, what it waits for and which rank holds it up."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

import ds_configs
from data.progress import Progress
from trainer.agreement import alone
from trainer.callback import Callback
from trainer.engine import Engine
from trainer.flops import ModelFlops
from trainer.metrics_writer import MetricsWriter, writers
from trainer.setup import StageSetup
from trainer.stragglers import Stragglers

if TYPE_CHECKING:
    from trainer.training import Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """What has added up so far, on this rank but for the first two. Times in seconds."""

    step: int
    consumed: dict[str, int]
    clock: float
    aside: float
    stall: float
    waited: float
    forward: float
    windows: Counter[int]

    @classmethod
    def of(cls, training: Training) -> Totals:
        """Waits for the device."""
        return cls(
            training.step,
            dict(training.consumed),
            time.monotonic(),
            training.elsewhere,
            training.checkpoints.stall,
            training.data.waited.seconds(),
            training.engine.forward_time.seconds(),
            Counter(training.data.windows),
        )


class Metrics(Callback):
    """Logs every `log_every` steps, and only then waits for the device. All ranks take part, rank 0 writes."""

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.engine = engine
        self.flops = ModelFlops(engine.module, setup.config.train.precision, engine.device)
        self.stragglers = Stragglers(setup.config.train.straggler_factor, engine.gather(socket.gethostname()))
        self._waits_in_forward = ds_configs.zero_stage(setup.config.train.zero) == 3
        self._writers: list[MetricsWriter] = []
        self._progress = Progress(setup.run / "progress" / f"{setup.stage}.json")
        self._then: Totals
        self._first = True
        """Whether this process has written no row yet."""

    def on_start(self, training: Training) -> None:
        self._open(training.step)
        if self.flops.peak is None:
            log.info("mfu is left out: the peak FLOP/s of %s is not known", self.flops.device_name)
        self._show(training, {})
        self._then = Totals.of(training)

    def _open(self, start: int) -> None:
        """Raises the same UserError on all ranks where rank 0 cannot write somewhere."""

        def opened() -> None:
            self._writers = writers(self.setup, start)

        alone(self.engine, opened, self.setup.folder)

    def after_step(self, training: Training, losses: Tensor) -> None:
        if not training.due(training.config.log_every):
            return
        training.count()
        then, now = self._then, Totals.of(training)
        quantizers = losses.tolist()
        loss = sum(quantizers) / len(quantizers)
        figures = {"loss": loss, "quantizers": quantizers, **self._state(training), **self._speed(then, now)}
        self.write("train", training.step, **figures)
        self._show(training, {"loss": loss})
        self._then = Totals.of(training)

    def _state(self, training: Training) -> dict[str, Any]:
        """Where the optimizer is."""
        return {
            "learning_rate": training.learning_rate,
            "gradient_norm": self.engine.gradient_norm(),
            "updates": self.engine.updates,
            "skipped": training.guard.read().bad,
            "consumed": training.consumed,
        }

    def _speed(self, then: Totals, now: Totals) -> dict[str, Any]:
        """What happened between two rows, on all ranks."""
        steps = now.step - then.step
        passed = now.clock - then.clock
        seconds = passed - (now.aside - then.aside)
        windows, tokens = (now.consumed[name] - then.consumed[name] for name in ("windows", "tokens"))
        waited = (now.waited - then.waited) / steps
        own = (waited, (now.forward - then.forward) / steps, self.flops.of(now.windows - then.windows), self._memory())
        waits, forwards, flops, memories = zip(*self.engine.gather(own), strict=True)
        field, quantizers = self.engine.module.target, len(self.engine.module.quantizers)
        figures = {
            "windows_per_second": windows / seconds,
            "tokens_per_second": tokens / seconds,
            "audio_seconds_per_second": tokens / quantizers / field.rate_hz / seconds,
            "step_seconds": seconds / steps,
            "data_wait": sum(waits) / len(waits) * steps / seconds,
            "checkpoint_stall": (now.stall - then.stall) / passed,
            "memory": max(memories),
        }
        if self.flops.peak is not None:
            figures["mfu"] = sum(flops) / (seconds * self.flops.peak * self.engine.world_size)
        return figures | self._ranks(now.step, waits, forwards)

    def _ranks(self, step: int, waits: tuple[float, ...], forwards: tuple[float, ...]) -> dict[str, Any]:
        """What each rank needs for its own part of a step, before it has to wait for others: data and forward passes.

        Under ZeRO-3 a forward pass waits for the weights that others hold. Then the shortest stands for all, and only
        data tell one rank from another.
        """
        if self._waits_in_forward:
            forwards = (min(forwards),) * len(forwards)
        own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
        figures: dict[str, Any] = {"rank_seconds": {"min": min(own), "median": median(own), "max": max(own)}}
        first, self._first = self._first, False
        # The first steps of a process are unlike the others: blocks are compiled, files opened.
        if self.engine.rank == 0 and not first:
            slow = self.stragglers.observe(step, own)
            if slow:
                figures["stragglers"] = {str(rank): times for rank, times in slow.items()}
        return figures

    def _memory(self) -> int:
        """Bytes: the most that was allocated on the GPU so far, or on a CPU what the process holds now."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device)
        return psutil.Process().memory_info().rss

    def on_checkpoint(self, training: Training, step: int) -> None:
        self.write("checkpoint", step, stall=training.checkpoints.stall)

    def on_end(self, training: Training) -> None:
        self.close()

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Appends a row of `figures`, on rank 0; `step` counts finished optimizer steps. Raises the same UserError on
        all ranks, which must all call it, where the disk is full or may not be written."""

        def append() -> None:
            for writer in self._writers:
                writer.write(kind, step, figures)

        alone(self.engine, append, self.setup.folder)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []

    def _show(self, training: Training, figures: dict[str, float]) -> None:
        """Moves the progress bar."""

        def show() -> None:
            self._progress.update(training.step, training.config.steps, "", **figures)

        alone(self.engine, show, self.setup.run)
