"""Where the weights of the pretrained encoders are: a local folder, or a hub id that the local cache holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.artifact import file_digest, fingerprint
from model.errors import UserError

DEFAULT_WEIGHTS = {"encodec": "facebook/encodec_24khz", "mert": "m-a-p/MERT-v0", "clap": "laion/clap-htsat-unfused"}
"""Hub id used where a recipe names no weights, by the kind of encoder."""
SECTIONS = {"encodec": "codec", "mert": "semantic", "clap": "joint"}
"""The section of `encoders` in a recipe that each kind belongs to."""
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NOTE = "pretrained.json"


def weights_key(kind: str) -> str:
    """The recipe's key for the weights of a `kind` of encoder, for messages."""
    return f"encoders.{SECTIONS[kind]}.weights"


def weights_folder(kind: str, weights: str | None) -> Path:
    """The folder with transformers weights that `weights` names, or DEFAULT_WEIGHTS where it is None.

    `weights` is a folder, or a hub id (owner/name) whose files the local cache holds. The network is never asked: a run
    on many machines would ask for each process, and an answer that changes would change the run. Raises UserError where
    there are no such weights.
    """
    name = weights or DEFAULT_WEIGHTS[kind]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached(name, weights_key(kind))
    if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in WEIGHTS):
        raise UserError(
            f"{weights_key(kind)}: {folder} needs {CONFIG} and {WEIGHTS[0]} (or {WEIGHTS[2]}), as transformers save "
            "them."
        )
    return folder


def weights_digest(kind: str, weights: str | None) -> str:
    """16 hex digits: of the bytes in a local folder, or of a hub id and the revision of it in the local cache.

    Raises UserError where `weights_folder` does.
    """
    name, folder = weights or DEFAULT_WEIGHTS[kind], weights_folder(kind, weights)
    if folder != Path(name).expanduser():
        return fingerprint(name, folder.name)  # the cache names a snapshot by its revision
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".bin", ".txt")]
    return fingerprint({path.name: file_digest(path) for path in files})


def load_pretrained(model_class: Any, kind: str, folder: Path, config: Any) -> Any:
    """A transformers model for inference in fp32, on the GPU where there is one.

    `config` is its configuration, which may ask for fewer layers than there are weights. No code from the folder is run
    and nothing but tensors is unpickled. Raises UserError where the weights do not cover the whole model.
    """
    try:
        model, found = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            weights_only=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{weights_key(kind)}: the weights in {folder} do not load: {error}") from None
    missing = [*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{weights_key(kind)}: {folder} is not a {model_class.__name__}: {len(missing)} tensors are missing or of "
            f"another shape, among them {missing[0]}."
        )
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def read_json(kind: str, folder: Path, name: str) -> dict[str, Any]:
    """The JSON file `name` of a weights folder. Raises UserError where it is missing or damaged."""
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError):
        raise UserError(f"{weights_key(kind)}: {folder / name} is missing or damaged.") from None


def save_note(folder: Path, kind: str, weights: str | None) -> None:
    """Writes which weights were used: pretrained weights are not copied into artifacts."""
    name = weights or DEFAULT_WEIGHTS[kind]
    note = {"kind": kind, "weights": name, "digest": weights_digest(kind, weights)}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def _cached(name: str, key: str) -> Path:
    """The newest snapshot of a hub id in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise UserError(
            f"{key}: {name} is neither a folder here nor in the local Hugging Face cache.\n"
            f"Fetch it once with `hf download {name}`, or name a folder that holds its files."
        ) from None
