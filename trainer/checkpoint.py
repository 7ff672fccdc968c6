"""Checkpoints that exist whole or are never chosen.

Every rank writes the stretches of the fp32 weights and the optimizer's state that it holds (`rank-0000.safetensors`),
with its random numbers, into a partial folder; it syncs the file and reads it back. When all have, rank 0 adds what the
ranks share (`state.json`) and a manifest with everybody's digests, and one rename gives the folder its name.

Such a checkpoint is universal from the start: a job of any number of ranks and any ZeRO choice reads the stretches that
it needs, so there is nothing to convert. It holds no pickle.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.processes import disk_full
from model import artifact
from model.errors import UserError
from trainer import random_state
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.tensor_files import SlicedTensors, slice_name, write_tensors

log = logging.getLogger(__name__)

KIND = "checkpoint"
STATE = "state.json"
RANDOM = "random"
USERS_OWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the disk that the user can put right."""


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    names = ("stretto", "torch", "deepspeed", "mosaicml-streaming", "safetensors")
    return {name: metadata.version(name) for name in names}


class Checkpointer:
    """Saves and loads the checkpoints of one stage. All ranks must call its methods together, but for `busy`.

    Rank 0 decides and every rank follows. `identity` says what a checkpoint must have been made from to be loaded: a
    value for each name.
    """

    def __init__(self, folder: Path, engine: Engine, config: TrainConfig, identity: dict[str, str]) -> None:
        self.folder = folder
        self.engine = engine
        self.config = config
        self.identity = identity
        self.stall = 0.0
        """Seconds that training has waited for checkpoints so far."""
        self._buffers: dict[str, Tensor] = {}
        self._pending: _Write | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a folder, newest first; nothing is said of their health."""
        found = (re.fullmatch(r"step-(\d{8})", path.name) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    # Saving

    def save(self, step: int, state: dict[str, Any], info: dict[str, Any]) -> None:
        """Copies what this rank holds and starts writing it. Of plain JSON, `state` is what the ranks share and take
        back, `info` what the manifest says besides.

        An earlier write that is still under way is waited for. Without `checkpoint_async` this one is too.
        """
        self.finish()
        started = time.monotonic()
        final = self.path(step)
        partial = final.with_name(f".{final.name}{artifact.PARTIAL}")
        tensors = self._copy()
        self._pending = _Write(step, partial, rank_file(self.engine.rank), tensors, state, info)
        self.stall += time.monotonic() - started
        if not self.config.checkpoint_async:
            self.finish()

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._pending is not None and self._pending.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and does not have its name yet: the same on all ranks."""
        return self._pending is not None

    def finish(self) -> int | None:
        """Waits for the write under way, if any, and gives the checkpoint its name; returns its step.

        Raises the same error on all ranks when one of them could not write.
        """
        if self._pending is None:
            return None
        started = time.monotonic()
        write, self._pending = self._pending, None
        write.join()
        results = self.engine.gather(write.result)
        self._agree([result for result in results if isinstance(result, str)])
        problem = None
        if self.engine.rank == 0:
            problem = _said(lambda: self._complete(write, {rank_file(n): r for n, r in enumerate(results)}))
        self._agree([said for said in [self.engine.broadcast(problem)] if said])
        self.stall += time.monotonic() - started
        return write.step

    def _copy(self) -> dict[str, Tensor]:
        """What this rank holds, in memory of the host's that is used again by the next save."""
        held: dict[str, Tensor] = {}
        for fragment in self.engine.held():
            for kind, values in fragment.tensors.items():
                name = slice_name(kind, fragment.name, fragment.start)
                if name not in self._buffers:
                    pinned = self.engine.device.type == "cuda"
                    self._buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
                held[name] = self._buffers[name].copy_(values, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        random = random_state.capture()
        return {**held, **{slice_name(RANDOM, name, 0): value for name, value in random.items()}}

    def _complete(self, write: _Write, files: dict[str, Any]) -> None:
        """Rank 0: the shared state, the manifest, the name; then what is too old goes."""
        (write.folder / STATE).write_text(json.dumps(write.state))
        files |= artifact.describe_files(write.folder, [STATE])
        artifact.sync(write.folder / STATE)
        info = {"step": write.step, "world_size": self.engine.world_size, "versions": versions(), **write.info}
        artifact.seal(write.folder, KIND, artifact.fingerprint(self.identity), self.identity, info, files)
        artifact.replace_folder(write.folder, self.path(write.step))
        for step in self._superseded():
            shutil.rmtree(self.path(step))

    def _superseded(self) -> list[int]:
        """Steps whose checkpoints may go. What is damaged does not count as kept: at least two good ones stay."""
        good = [step for step in self.steps() if not self._wrong(step, digests=False)]
        kept = set(good[: self.config.keep_last])
        if self.config.keep_every:
            kept |= {step for step in good if step % self.config.keep_every == 0}
        if self.config.keep_best:
            judged = [(figure, step) for step in good if (figure := self._figure(step)) is not None]
            kept |= {min(judged)[1]} if judged else set()
        return [step for step in good if step not in kept]

    def _figure(self, step: int) -> float | None:
        """What a checkpoint is judged by; none where no validation was due at its step."""
        return artifact.read(self.path(step), KIND).info.get("validation", {}).get(self.config.keep_best)

    def _agree(self, problems: list[str]) -> None:
        if not problems:
            return
        kind, _, message = problems[0].partition(": ")
        raise UserError(message) if kind == "user" else RuntimeError(message)

    # Loading

    def clear_partial(self) -> None:
        """Removes what a killed job was writing. Before the first save of this job."""
        if self.engine.rank == 0:
            for partial in self.folder.glob(f".*{artifact.PARTIAL}*"):
                shutil.rmtree(partial)
        self.engine.barrier()

    def choose(self) -> int | None:
        """The step to go on from: the newest whose files are what its manifest says, or the one asked for.

        Damaged ones are named and passed over. None where there has never been one. Raises UserError where one was
        asked for, or must have been there, and none is good.
        """
        steps = self.engine.broadcast(self.steps() if self.engine.rank == 0 else None)
        asked = self.config.resume
        if isinstance(asked, int) and asked not in steps:
            raise UserError(f"there is no checkpoint of step {asked} in {self.folder} (train.resume={asked}).")
        for step in [asked] if isinstance(asked, int) else steps:
            wrong = [problem for problems in self.engine.gather(self._my_part(step)) for problem in problems]
            if not wrong:
                return step
            if self.engine.rank == 0:
                log.warning("checkpoint of step %d is damaged and passed over: %s", step, "; ".join(wrong))
        if steps or asked == "always":
            what = "none of the checkpoints" if steps else "there is no checkpoint"
            raise UserError(
                f"{what} in {self.folder} {'is whole' if steps else 'to go on from (train.resume=always)'}.\n"
                "To start this stage over, move that folder away."
            )
        return None

    def _my_part(self, step: int) -> list[str]:
        """What is wrong with this rank's share of the files of a checkpoint."""
        return self._wrong(step, share=(self.engine.rank, self.engine.world_size))

    def _wrong(self, step: int, digests: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
        try:
            return artifact.problems(artifact.read(self.path(step), KIND), digests, share)
        except UserError as error:
            return [str(error)] if share[0] == 0 else []

    def load(self, step: int) -> dict[str, Any]:
        """Takes back the checkpoint of `step`, whose digests `choose` has checked, and returns the shared state.

        Raises UserError where it was made from something else.
        """
        found = artifact.read(self.path(step), KIND)
        for name, value in self.identity.items():
            if found.manifest["inputs"].get(name) != value:
                raise UserError(
                    f"the checkpoint of step {step} in {self.folder} was made with another {name}: "
                    "it does not fit this run. Use the recipe it was made with, or move that folder away to start over."
                )
        files = [found.path / rank_file(rank) for rank in range(found.info["world_size"])]
        tensors = SlicedTensors(files)
        for fragment in self.engine.needed():
            for kind, target in fragment.tensors.items():
                tensors.read(kind, fragment.name, fragment.start, target)
        state = json.loads((found.path / STATE).read_text())
        if found.info["world_size"] == self.engine.world_size:
            random_state.restore(_random(files[self.engine.rank]))
        else:
            random_state.seed(step * self.engine.world_size + self.engine.rank)
        return state

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints newer than `step`: the training goes another way from there."""
        if self.engine.rank == 0:
            for later in [other for other in self.steps() if other > step]:
                shutil.rmtree(self.path(later))
        self.engine.barrier()


class _Write(threading.Thread):
    """Writes one rank's file beside the training."""

    def __init__(
        self,
        step: int,
        folder: Path,
        name: str,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        info: dict[str, Any],
    ) -> None:
        super().__init__(name=f"checkpoint of step {step}")
        self.step, self.folder, self.file, self.tensors = step, folder, name, tensors
        self.state, self.info = state, info
        self.result: dict[str, Any] | str = "fault: the write ended before its time"
        """Size and digest, or what went wrong."""
        self.start()

    def run(self) -> None:
        problem = _said(self._write)
        if problem:
            self.result = problem

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result = write_tensors(self.folder / self.file, self.tensors)


def _said(action: Callable[[], None]) -> str | None:
    """Does `action`; where the disk refuses returns that in words for the other ranks, "user: …" or "fault: …"."""
    try:
        action()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"user: {disk_full(error.filename)}"
        kind = "user" if error.errno in USERS_OWN else "fault"
        return f"{kind}: the checkpoint could not be written: {error}"
    return None


def _random(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{RANDOM}/")]  # noqa: SIM118 (not a mapping)
        return {key.split("/")[1]: file.get_tensor(key) for key in keys}
