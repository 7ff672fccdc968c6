"""Checkpoints that exist whole or are never chosen.

Every rank writes the stretches of the fp32 weights and the optimizer's state that it holds (`rank-0000.safetensors`),
with its random numbers, into a partial folder; it syncs the file and reads it back. When all have, rank 0 adds what the
ranks share (`state.json`) and a manifest with everybody's digests, and one rename gives the folder its name.

Such a checkpoint is universal from the start: a job of any number of ranks and any ZeRO choice reads the stretches that
it needs, so there is nothing to convert. It holds no pickle.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from data.cloud import Unreachable
from model import artifact
from model.errors import UserError
from trainer import random_state
from trainer.agreement import alone, raise_alike, said
from trainer.checkpoint_folder import (
    STATE,
    figure,
    problems,
    rank_file,
    read,
    refuse_newer,
    seal,
    step_name,
    steps_in,
    superseded,
)
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.remote import Remote, Uploads
from trainer.tensor_files import SlicedTensors, slice_name, write_tensors

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RANDOM = "random"
REMOVED = ".removed"
"""Ends the hidden name under which a folder is removed."""


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
        self._uploads: Uploads | None = None
        """Rank 0's, where checkpoints are uploaded."""
        self._buffers: dict[str, Tensor] = {}
        self._pending: _Write | None = None

    def path(self, step: int) -> Path:
        return self.folder / step_name(step)

    def open(self) -> None:
        """Before anything else: removes what a killed job was writing or removing, and sees whether the remote can be
        reached. Raises UserError where the folder cannot be changed, the bucket or the credentials are wrong, or the
        remote holds the checkpoints of another run."""
        self._decide(self._open)

    def _open(self) -> None:
        for hidden in self.folder.glob(".step-*"):
            shutil.rmtree(hidden)
        if self.config.upload is None:
            return
        remote = Remote(self.config.upload, self.folder.parent.name)
        try:
            copies = remote.whole()
        except Unreachable:
            raise
        except (UserError, PermissionError) as error:
            raise UserError(f"train.upload: {error}") from None
        for step, manifest in copies.items():
            self._check_identity(manifest, remote.url(step), "choose another train.upload")
        self._uploads = Uploads(remote, self.folder, self.config)

    def close(self) -> None:
        """After everything else: waits for the upload under way, at most half of `hang_timeout`, and lets what only
        stayed to be copied go."""
        if self._uploads:
            self._uploads.finish(self.config.hang_timeout / 2)
            self._remove_superseded()
        self.engine.barrier()

    # Saving

    def save(self, step: int, state: dict[str, Any], info: dict[str, Any]) -> None:
        """Copies what this rank holds and starts writing it. Of plain JSON, `state` is what the ranks share and take
        back, `info` what the manifest says besides.

        An earlier write that is still under way is waited for.
        """
        self.finish()
        started = time.monotonic()
        folder = self._hidden(step, artifact.PARTIAL)
        tensors = self._copy()
        shared = copy.deepcopy((state, info))  # the training goes on and changes its own
        self._pending = _Write(step, folder, rank_file(self.engine.rank), tensors, *shared)
        self.stall += time.monotonic() - started

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
        raise_alike([result for result in results if isinstance(result, str)])
        self._decide(lambda: self._complete(write, {rank_file(n): r for n, r in enumerate(results)}))
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
        """Rank 0: the shared state, the manifest, the name; then what is too old goes, and the upload starts."""
        (write.folder / STATE).write_text(json.dumps(write.state))
        files |= artifact.describe_files(write.folder, [STATE])
        artifact.sync(write.folder / STATE)
        own = {
            "step": write.step,
            "world_size": self.engine.world_size,
            "resume": self.config.resume,
            "shapes": {name: list(shape) for name, shape in self.engine.shapes.items()},
        }
        seal(write.folder, self.identity, {**own, "versions": versions(), **write.info}, files)
        wrong = problems(write.folder, digests=False)
        if wrong:
            raise UserError(
                f"{'; '.join(wrong)}, though its rank has written it: all ranks must see the same run folder. "
                "Put it on a disk that all hosts share."
            )
        artifact.replace_folder(write.folder, self.path(write.step))
        artifact.sync(self.folder.parent)
        self._remove_superseded()
        if self._uploads:
            self._uploads.start()

    def _remove_superseded(self) -> None:
        """What is damaged does not count as kept: at least two good ones stay."""
        good = [step for step in steps_in(self.folder) if not problems(self.path(step), digests=False)]
        figures = {step: figure(read(self.path(step)).info, self.config) for step in good}
        uploading = self._uploads.uploading if self._uploads else None
        for step in superseded(figures, self.config):
            if step != uploading:
                self._remove(step)

    def _hidden(self, step: int, ending: str) -> Path:
        return self.folder / f".{step_name(step)}{ending}"

    def _remove(self, step: int) -> None:
        """From the first moment on it has no name that is looked for: interrupted, nothing is half there."""
        hidden = self._hidden(step, REMOVED)
        self.path(step).rename(hidden)
        try:
            shutil.rmtree(hidden)
        except OSError as error:  # a reader on a shared disk, say; the next start removes it
            log.warning("%s could not be removed yet: %s", hidden, error)

    def _decide(self, action: Callable[[], Result]) -> Result:
        """What `action` returns on rank 0, where alone it is done; what it raises is raised on all ranks."""
        return alone(self.engine, action, self.folder)

    # Loading

    def choose(self) -> int | None:
        """The step to go on from: the newest whose files are what its manifest says, or the one asked for. What is only
        in the remote, or damaged here, is fetched from there.

        Damaged ones are named and passed over. None where there has never been one. Raises UserError where one was
        asked for, or must have been there, and none is good, and for one that a later Stretto wrote.
        """
        steps = self._decide(self._candidates)
        for step in steps:
            self._decide(partial(refuse_newer, self.path(step)))
            if self._is_good(step) or self._decide(partial(self._fetch, step)):
                return step
        asked = self.config.resume
        if isinstance(asked, int):
            raise UserError(f"there is no good checkpoint of step {asked} in {self.folder} (train.resume={asked}).")
        if steps or asked == "always":
            what = "none of the checkpoints" if steps else "there is no checkpoint"
            raise UserError(
                f"{what} in {self.folder} {'is whole' if steps else 'to go on from (train.resume=always)'}.\n"
                "To start this stage over, move that folder away."
            )
        return None

    def _candidates(self) -> list[int]:
        """The steps that may be gone on from, newest first, here or in the remote.

        With a step asked for: that one, or those that were saved since by the same command, which may have been
        interrupted.
        """
        there = self._uploads.remote.finished() if self._uploads else []
        steps = sorted({*steps_in(self.folder), *there}, reverse=True)
        asked = self.config.resume
        if not isinstance(asked, int):
            return steps

        whole = self._uploads.remote.whole() if self._uploads else {}

        def made_since(step: int) -> bool:
            try:
                info = read(self.path(step)).info
            except artifact.NewerFormat:  # going back is how to leave it
                return False
            except UserError:  # `choose` passes it over
                info = whole.get(step, {}).get("info", {"resume": asked})
            return step > asked and info["resume"] == asked

        return [*itertools.takewhile(made_since, steps), *(step for step in steps if step == asked)]

    def _is_good(self, step: int) -> bool:
        """Whether a checkpoint is whole; the ranks share the reading."""
        mine = problems(self.path(step), share=(self.engine.rank, self.engine.world_size))
        wrong = dict.fromkeys(problem for part in self.engine.gather(mine) for problem in part)
        if wrong and self.engine.rank == 0 and self.path(step).exists():
            log.warning("checkpoint of step %d is damaged and passed over: %s", step, "; ".join(wrong))
        return not wrong

    def _fetch(self, step: int) -> bool:
        """Rank 0: brings a checkpoint from the remote, where it is whole there, and gives it its name."""
        if not self._uploads or step not in self._uploads.remote.finished():
            return False
        folder, url = self._hidden(step, artifact.PARTIAL), self._uploads.remote.url(step)
        folder.mkdir(parents=True)
        log.info("fetching %s", url)
        self._uploads.remote.download(step, folder)
        wrong = problems(folder)
        if wrong:
            log.warning("%s is damaged and passed over: %s", url, "; ".join(wrong).replace(f"{folder}/", url))
            shutil.rmtree(folder)
            return False
        artifact.sync(folder)
        artifact.replace_folder(folder, self.path(step))
        return True

    def _check_identity(self, manifest: dict[str, Any], place: str, remedy: str) -> None:
        for name, value in self.identity.items():
            if manifest["inputs"].get(name) != value:
                raise UserError(
                    f"{place} was made with another {name}: it does not fit this run. "
                    f"Use the recipe it was made with, or {remedy}."
                )

    def load(self, step: int) -> dict[str, Any]:
        """Takes back the checkpoint of `step`, whose digests `choose` has checked, and returns the shared state.

        Raises UserError where it was made from something else.
        """
        found = read(self.path(step))
        place = f"the checkpoint of step {step} in {self.folder}"
        self._check_identity(found.manifest, place, "move that folder away to start over")
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
        """Removes the checkpoints newer than `step`, here and in the remote: training goes another way from there."""
        self._decide(lambda: self._forget_after(step))

    def _forget_after(self, step: int) -> None:
        for later in [other for other in steps_in(self.folder) if other > step]:
            self._remove(later)
        if self._uploads:
            remote = self._uploads.remote
            for later in sorted((other for other in remote.listing() if other > step), reverse=True):
                remote.remove(later)


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
        super().__init__(name=f"checkpoint of step {step}", daemon=True)  # a disk that hangs must not hold the exit
        self.step, self.folder, self.file, self.tensors = step, folder, name, tensors
        self.state, self.info = state, info
        self.result: dict[str, Any] | str = f"fault: {folder / name} was not written; its rank says why"
        """Size and digest, or what went wrong."""
        self.start()

    def run(self) -> None:
        problem = said(self._write, self.folder)
        if problem:
            self.result = problem

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result = write_tensors(self.folder / self.file, self.tensors)


def _random(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{RANDOM}/")]  # noqa: SIM118 (not a mapping)
        return {key.split("/")[1]: file.get_tensor(key) for key in keys}
