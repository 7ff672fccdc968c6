"""What may hold weights, and what tells one from another. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from model import artifact
from model.errors import UserError
from trainer import zip_records

CONVERTED = "weights"
"""Kind of the artifact of `stretto convert --to fp32`."""
UNIVERSAL = "universal"
"""Of `--to universal`."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that transformers gives to a model's weights: one file, or the list of several."""


def weights_fingerprint(path: Path) -> str:
    """Changes with the weights at `path`, wherever that lies. Reads little where a manifest tells; else all of it.
    Raises UserError where there is nothing."""
    if path.is_file():
        return artifact.fingerprint(_noted(path) or artifact.file_digest(path))
    if (path / artifact.MANIFEST).is_file():
        return artifact.read(path).fingerprint
    if not path.is_dir():
        raise UserError(f"{path} does not exist.")
    files = sorted(file for pattern in ("*.safetensors", INDEX, "latest*") for file in path.glob(pattern))
    zipped = sorted(path.glob("**/*.pt"))
    if not files and not zipped:
        raise UserError(f"{path} holds no weights.")
    return artifact.fingerprint(
        {file.name: artifact.file_digest(file) for file in files}, zip_records.fingerprint(zipped)
    )


def _noted(path: Path) -> str | None:
    """The digest of a file that the manifest beside it has, such as a bundle's."""
    try:
        return json.loads((path.parent / artifact.MANIFEST).read_text())["files"][path.name]["sha256"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None
