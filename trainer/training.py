"""The training loop of one stage: from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from model import artifact
from model.errors import UserError
from trainer import stopping
from trainer.agreement import alone
from trainer.batches import TrainingBatches
from trainer.callback import Callback
from trainer.checkpoint import Checkpointer
from trainer.corpora import prepare
from trainer.engine import Engine
from trainer.initial_weights import Matched, initialise_from
from trainer.metrics import Metrics
from trainer.metrics_reader import METRICS, last_metrics
from trainer.schedule import Schedule
from trainer.setup import AVERAGE_WEIGHTS, WEIGHTS, StageSetup
from trainer.spikes import SpikeGuard
from trainer.tensor_files import write_tensors
from trainer.watchdog import Heartbeat
from trainer.weights_kinds import STAGE

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A rank was told to stop; the state is saved and the same command goes on from it."""


class Diverged(Exception):
    """Too many steps in a row were bad. Their losses never reached the weights, which are saved."""


def callbacks(setup: StageSetup, engine: Engine) -> list[Callback]:
    """What hangs on the loop of every training, in the order in which it is called."""
    from trainer.evaluation import Evaluation
    from trainer.garbage import GarbageCollection
    from trainer.profiling import Profiling

    found: list[Callback] = [Evaluation(setup, engine), Profiling(setup, engine), GarbageCollection()]
    if setup.config.train.sample_every is not None:
        from trainer.samples import Samples

        found.append(Samples(setup, engine))
    return found


class Training:
    """One stage on all ranks. Rank 0 alone writes metrics; every rank takes part in every save.

    A watchdog may look at `heartbeat` meanwhile. SIGTERM and SIGUSR1 stop it where `trainer.stopping` heeds them.
    """

    def __init__(self, setup: StageSetup, engine: Engine, heartbeat: Heartbeat | None = None) -> None:
        self.setup = setup
        self.config = setup.config.train
        self.engine = engine
        self.heartbeat = heartbeat or Heartbeat()
        prepare(setup, engine)
        self.data = TrainingBatches(setup, engine.module, engine.micro_batch, engine.device)
        self.schedule = Schedule(self.config)
        self.guard = SpikeGuard(self.config.spike_threshold, engine.device)
        self.checkpoints = Checkpointer(setup.folder / "checkpoints", engine, self.config, setup.identity)
        self.metrics = Metrics(setup, engine)
        self.callbacks = [self.metrics, *callbacks(setup, engine)]
        self.step = 0
        self.learning_rate = 0.0
        self.consumed = {"windows": 0, "tokens": 0}
        """By all ranks since step 0, when it was last counted."""
        self._consumed_before = self.consumed
        """By earlier processes."""
        self.validation: dict[str, Any] = {}
        """Figures of the last one."""
        self.elsewhere = 0.0
        """Seconds this process has spent on other things than steps."""

    def run(self) -> None:
        """Trains to the last step and writes the weights.

        Raises Interrupted after saving when a rank was told to stop, Diverged when too many steps in a row were bad.
        """
        self._start()
        while self.step < self.config.steps:
            self._call("before_step")
            self.beat("loading data")
            self.learning_rate = self.engine.set_learning_rate(self.schedule.factor(self.step))
            batches = self.data.take(self.engine.accumulation)
            self.beat("the training step")
            losses = self.engine.train_step(batches, self.guard)
            self.step += 1
            self.heartbeat.stepped = True
            self._call("after_step", losses)
            self._check_losses()
            self._save_when_due()
        self.beat("writing the weights")
        self._write_weights()
        self._call("on_end")
        self._close()

    def beat(self, what: str) -> None:
        """A sign of life: `what` begins. Whatever takes long gives one now and then."""
        self.heartbeat.beat(self.step, what)

    def due(self, every: int | None) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return every is not None and (self.step % every == 0 or self.step == self.config.steps)

    def count(self) -> None:
        """Brings `consumed` up to date. All ranks must call it."""
        taken = self.data.windows
        frames = sum(number * length for length, number in taken.items())
        since = self.engine.sum(taken.total(), frames * len(self.engine.module.quantizers))
        before = self._consumed_before
        self.consumed = {name: before[name] + more for name, more in zip(before, since, strict=True)}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in it does not count as training time."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.elsewhere += time.monotonic() - started

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            self.beat(f"{type(callback).__name__}.{event}")
            getattr(callback, event)(self, *arguments)

    def _start(self) -> None:
        self.beat("looking for a checkpoint")
        self.checkpoints.open()
        step = self.checkpoints.choose()
        matched = None
        if step is None:
            self._check_never_saved()
            matched = self._initialise()
        else:
            self.beat(f"loading the checkpoint of step {step}")
            self.load_state_dict(self.checkpoints.load(step))
            self.checkpoints.forget_after(step)
            if self.engine.rank == 0:
                log.info("resumed at step %d of %d", self.step, self.config.steps)
        self._call("on_start")
        if matched is not None:
            self.metrics.write("initial", 0, **matched.to_json())
        if any(self.engine.most(stopping.told())) and self.step < self.config.steps:
            self._interrupt()

    def _check_never_saved(self) -> None:
        """Raises UserError where this stage has saved before: starting over would throw that away unasked."""
        before = last_metrics(self.setup.folder / METRICS, "checkpoint")
        if before is not None:
            raise UserError(
                f"{self.checkpoints.folder} is empty, but this stage has saved step {before['step']} there. "
                f"Bring it back, or move {self.setup.folder} away to start over."
            )

    def _initialise(self) -> Matched | None:
        """The weights that a new training begins with, where the recipe names some."""
        if self.config.init_from is None:
            return None
        what = "loading the initial weights"
        self.beat(what)
        return initialise_from(self.engine, Path(self.config.init_from), self.setup.folder, lambda: self.beat(what))

    def _check_losses(self) -> None:
        """The host looks at the losses only when it logs: a bad one changes nothing meanwhile."""
        if not self.due(self.config.log_every):
            return
        state = self.guard.read()
        if state.bad_in_a_row >= self.config.most_bad_steps:
            self._save()
            self._finish_save()
            self._close()
            stage = self.setup.stage
            good = self.step - state.bad_in_a_row
            raise Diverged(
                f"the loss or gradient of stage {stage!r} was not finite, or the loss a spike, in all steps after "
                f"{good}, the last good one, whose weights are saved.\n"
                f"Lower stages.{stage}.train.learning_rate, or look at the data of those steps."
            )

    def _save_when_due(self) -> None:
        self.beat("agreeing on what to do next")
        stop, busy = self.engine.most(stopping.told(), self.checkpoints.busy)
        if self.checkpoints.pending and not busy:
            self._finish_save()
        if self.due(self.config.checkpoint_every) or stop:
            self._finish_save()
            self._save()
        if stop or self.step == self.config.steps or not self.config.checkpoint_async:
            self._finish_save()
        if stop and self.step < self.config.steps:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self.metrics.close()
        self._close()
        raise Interrupted(f"stopped at step {self.step} of {self.config.steps}")

    def _close(self) -> None:
        self.data.close()
        self.checkpoints.close()
        self.engine.clear_swap()

    def _save(self) -> None:
        self.beat("starting to save")
        with self.aside():
            self.count()
            info = {
                "config": self.setup.config.model_dump(mode="json"),
                "consumed": self.consumed,
                "validation": {name: value for name, value in self.validation.items() if isinstance(value, float)}
                if self.due(self.config.validate_every)
                else {},
            }
            self.checkpoints.save(self.step, self.state_dict(), info)

    def _finish_save(self) -> None:
        self.beat("waiting for what is being saved")
        with self.aside():
            step = self.checkpoints.finish()
        if step is not None:
            self._call("on_checkpoint", step)

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share, as plain JSON; each rank's own is in its file."""
        return {
            "step": self.step,
            "updates": self.engine.updates,
            "consumed": self.consumed,
            "data": self.data.state_dict(),
            "schedule": self.schedule.state_dict(),
            "spikes": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.engine.updates = state["updates"]
        self.consumed = self._consumed_before = state["consumed"]
        self.data.load_state_dict(state["data"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["spikes"])

    def _write_weights(self) -> None:
        """The finished stage: its fp32 weights and a manifest, which makes the folder an artifact."""
        names = [WEIGHTS, AVERAGE_WEIGHTS] if self.engine.averages else [WEIGHTS]
        parameters = [self._write_tensors(name) for name in names]

        def finish() -> None:
            model = self.setup.config.model.model_dump(mode="json")
            info = {"steps": self.step, "parameters": parameters[0], "model": model}
            artifact.write_manifest(self.setup.folder, STAGE, self.setup.fingerprint, self.setup.identity, info, names)

        alone(self.engine, finish, self.setup.folder)

    def _write_tensors(self, name: str) -> int:
        """Rank 0 writes the whole weights, or their average, and returns how many there are."""
        average = name == AVERAGE_WEIGHTS
        weights = {key: value for key, value in self.engine.full_weights(average) if self.engine.rank == 0}

        def write() -> None:
            partial = self.setup.folder / f".{name}{artifact.PARTIAL}"
            write_tensors(partial, dict(sorted(weights.items())))
            partial.replace(self.setup.folder / name)

        alone(self.engine, write, self.setup.folder)
        return sum(value.numel() for value in weights.values())
