"""The folders of checkpoints: what they are called, whether one is whole, and which stay."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import artifact
from model.errors import UserError
from trainer.config import TrainConfig

KIND = "checkpoint"
STATE = "state.json"
"""What all ranks share; each rank's own is in its `rank_file`."""


def step_name(step: int) -> str:
    """What the folder of a checkpoint is called."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder in it, newest first; nothing is said of their health."""
    found = (re.fullmatch(r"step-(\d{8})", path.name) for path in folder.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def seal(folder: Path, identity: dict[str, str], info: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest of a checkpoint; its fingerprint covers all that it says."""
    artifact.seal(folder, KIND, artifact.fingerprint(identity, info, files), identity, info, files)


def genuine(manifest: dict[str, Any]) -> bool:
    """Whether a manifest says what `seal` wrote."""
    said = (manifest.get(key) for key in ("inputs", "info", "files"))
    return artifact.fingerprint(*said) == manifest.get("fingerprint") and artifact.unchanged(manifest)


def read(folder: Path) -> artifact.Artifact:
    """A checkpoint and what its manifest says. Raises UserError where there is none, or the manifest has changed."""
    found = artifact.read(folder, KIND)
    if not genuine(found.manifest):
        raise UserError(f"{folder / artifact.MANIFEST} has changed since it was written")
    return found


def problems(folder: Path, digests: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, or with a share of its files, in words; see `artifact.problems`."""
    try:
        return artifact.problems(read(folder), digests, share)
    except (UserError, OSError) as error:
        return [str(error)]


def refuse_newer(folder: Path) -> None:
    """Raises UserError where a later Stretto wrote a checkpoint, which is no damage: it is not to be passed over."""
    try:
        artifact.read(folder, KIND)
    except artifact.NewerFormat as error:
        raise UserError(f"{error} Or say with train.resume which step to go back to.") from None
    except (UserError, OSError):  # `problems` says what
        return


def figure(info: dict[str, Any], config: TrainConfig) -> float | None:
    """What `keep_best` judges a checkpoint by, given what its manifest says; None where it was not validated."""
    return info.get("validation", {}).get(config.keep_best)


def superseded(good: Mapping[int, float | None], config: TrainConfig) -> list[int]:
    """The steps among `good` whose checkpoints may go, oldest first.

    Only good checkpoints may be given, each with the figure that `keep_best` names, or None where it was not validated:
    then at least two good ones stay, since `keep_last` is two or more.
    """
    steps = sorted(good)
    kept = set(steps[-config.keep_last :])
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    judged = [(figure, step) for step, figure in good.items() if figure is not None and math.isfinite(figure)]
    if config.keep_best and judged:
        kept.add(min(judged)[1])
    return [step for step in steps if step not in kept]
