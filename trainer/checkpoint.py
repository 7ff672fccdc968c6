"""Checkpoints that exist whole or are never chosen."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from model import artifact
from model.errors import UserError
from trainer.engine import Engine

log = logging.getLogger(__name__)

KIND = "checkpoint"


class Checkpointer:
    """Saves into a partial folder, digests it, and gives it its name last; loads the newest that is whole.

    Rank 0 decides which step is loaded and every rank follows.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a folder, newest first; nothing is said of their health."""
        found = (re.fullmatch(r"step-(\d{8})", path.name) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`. All ranks must call it; `state` is rank 0's."""
        final = self.path(step)
        partial = final.with_name(f".{final.name}{artifact.PARTIAL}")
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save(partial, {"stretto": state})
        engine.barrier()
        if engine.rank == 0:
            artifact.write_manifest(partial, KIND, self.fingerprint, info={"step": step})
            artifact.replace_folder(partial, final)
            for old in self.steps()[self.keep :]:
                shutil.rmtree(self.path(old))
        engine.barrier()

    def newest(self) -> int | None:
        """The newest step whose files are what its manifest says; damaged ones are named and passed over."""
        for step in self.steps():
            try:
                found = artifact.read(self.path(step), KIND)
                wrong = artifact.problems(found)
            except UserError as error:
                wrong = [str(error)]
            if not wrong:
                return step
            log.warning("checkpoint of step %d is damaged and passed over: %s", step, "; ".join(wrong))
        return None

    def load_newest(self, engine: Engine) -> tuple[int, dict[str, Any]] | None:
        """Loads the newest good checkpoint on all ranks: its step and state, or None where there is none."""
        step = engine.broadcast(self.newest() if engine.rank == 0 else None)
        if step is None:
            return None
        return step, engine.load(self.path(step))["stretto"]
