"""What may hold weights, and what tells one from another. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from model import artifact
from model.errors import UserError
from trainer import zip_records
from trainer.checkpoint_folder import KIND as CHECKPOINT

STAGE = "stage"
"""Kind of the artifact that a training leaves."""
CONVERTED = "weights"
"""Of `stretto convert --to fp32`."""
UNIVERSAL = "universal"
"""Of `--to universal`."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that transformers gives to a model's weights: one file, or the list of several."""
KINDS = (CHECKPOINT, STAGE, CONVERTED, UNIVERSAL)
NOT_KNOWN = (
    "holds no weights that are known here: name a checkpoint (RUN/STAGE/checkpoints/step-…, or one of DeepSpeed's), a "
    "trained stage (RUN/STAGE), a folder of `stretto convert`, or a .safetensors file."
)
LATEST = "latest"
"""The file that names the newest checkpoint in a folder of DeepSpeed's."""


def weights_fingerprint(path: Path) -> str:
    """Changes with the weights at `path`, wherever that lies. Reads little where a manifest tells; else all of it.
    Raises UserError where there is nothing."""
    if path.is_file():
        known = noted(path)
        return artifact.fingerprint(
            known.manifest["files"][path.name]["sha256"] if known else artifact.file_digest(path)
        )
    if (path / artifact.MANIFEST).is_file():
        return identity(artifact_with_weights(path))
    if not path.is_dir():
        raise UserError(f"{path} does not exist.")
    folder = tagged(path)
    files = sorted(file for pattern in ("*.safetensors", INDEX) for file in folder.glob(pattern))
    zipped = sorted(folder.glob("**/*.pt"))
    if not files and not zipped:
        raise UserError(f"{path} {NOT_KNOWN}")
    return artifact.fingerprint(
        {file.name: artifact.file_digest(file) for file in files}, zip_records.fingerprint(zipped)
    )


def artifact_with_weights(path: Path) -> artifact.Artifact:
    """The artifact at `path`. Raises UserError where it is none that holds weights of a stage."""
    found = artifact.read(path)
    if found.kind not in KINDS:
        raise UserError(f"{path} is of kind {found.kind!r} and {NOT_KNOWN}")
    return found


def identity(found: artifact.Artifact) -> str:
    """Changes with the weights in an artifact. The fingerprint of a stage tells what it was trained from, not that it
    was trained again, which on other ranks gives others."""
    if found.kind == STAGE:
        return artifact.fingerprint(found.fingerprint, found.manifest["files"])
    return found.fingerprint


def tagged(folder: Path) -> Path:
    """The checkpoint that a folder of DeepSpeed's names as its latest, or the folder itself."""
    for pointer in (LATEST, "latest_universal"):
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text(errors="replace").strip()
            if not re.fullmatch(r"[\w.-]+", tag) or set(tag) == {"."} or not (folder / tag).is_dir():
                if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
                    return folder  # whoever passed the weights on left the checkpoint out
                raise UserError(f"{folder / pointer} names {tag[:60]!r}, which is no folder beside it.")
            return folder / tag
    return folder


def noted(path: Path) -> artifact.Artifact | None:
    """What the manifest beside `path`, such as a bundle's, says of this file alone; None where it is part of no
    artifact. Raises UserError where that manifest is damaged or of a later version, and where `path` is a part of a
    checkpoint, which has slices of weights."""
    if not artifact.is_artifact(path.parent):
        return None
    found = artifact.read(path.parent)
    if found.kind == CHECKPOINT:
        raise UserError(f"{path} is a part of the checkpoint {path.parent}: name that folder.")
    files = {name: file for name, file in found.manifest["files"].items() if name == path.name}
    return artifact.Artifact(found.path, {**found.manifest, "files": files}) if files else None
