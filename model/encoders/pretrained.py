"""Where the weights of the pretrained encoders are, and how they are read without running anything from them.

`weights` names a folder as transformers save them, a hub id that the local cache holds, or, for EnCodec and CLAP, a
checkpoint file of the encoder's own library (model/encoders/checkpoint.py). The network is never asked: a run on many
machines would ask for each process, and an answer that changes would change the run.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from model.artifact import file_digest, fingerprint
from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig
from model.errors import UserError

EncoderConfig = CodecConfig | SemanticEncoderConfig | JointEmbedderConfig

SECTIONS = {"encodec": "codec", "mert": "semantic", "hubert": "semantic", "clap": "joint"}
"""The section of `encoders` in a recipe that each pretrained kind belongs to."""
DEFAULT_WEIGHTS = {
    "encodec": "facebook/encodec_24khz",
    "mert": "m-a-p/MERT-v0",
    "hubert": "facebook/hubert-base-ls960",
    "clap": "laion/clap-htsat-unfused",
}
"""Hub id used where a recipe names no weights."""
ENCODEC_48 = "facebook/encodec_48khz"
"""The same for EnCodec at 48 kHz."""
OWN_FILES = {
    "encodec": (
        "EnCodec's own checkpoints are https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th and "
        "encodec_48khz-7e698e3e.th beside it."
    ),
    "clap": "LAION's own checkpoints come with `hf download lukewys/laion_clap NAME.pt --local-dir FOLDER`.",
}
"""Where to get the files that are no folder, of the kinds that have such."""
FILE_SUFFIXES = (".th", ".pt", ".pth", ".ckpt", ".safetensors")
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
READ_SUFFIXES = (".json", ".safetensors", ".bin", ".txt")
"""Files of a folder that decide what an encoder makes."""
TOKENIZERS = ("roberta-base", "FacebookAI/roberta-base")
"""The tokenizer of LAION's checkpoints, by both of its hub ids."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
NOTE = "pretrained.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def weights_name(config: EncoderConfig) -> str:
    """What the recipe names as the weights, or the usual ones."""
    if config.weights is None and config.kind == "encodec" and config.sample_rate == 48_000:
        return ENCODEC_48
    return config.weights or DEFAULT_WEIGHTS[config.kind]


def weights_key(kind: str) -> str:
    """The recipe's key for the weights of a `kind` of encoder, for messages."""
    return f"encoders.{SECTIONS[kind]}.weights"


def find_weights(config: EncoderConfig) -> Path:
    """The folder with transformers' files, or the checkpoint file, that a recipe means.

    Raises UserError where there are no such weights; it says what to fetch.
    """
    key, name = weights_key(config.kind), weights_name(config)
    path = Path(name).expanduser()
    if path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
        if config.kind not in OWN_FILES:
            raise UserError(f"{key}: {name} must be a folder with transformers' files, or a hub id; not a file.")
        if not path.is_file():
            raise UserError(f"{key}: there is no file {name}.\n{OWN_FILES[config.kind]}")
        return path
    folder = find_folder(key, name)
    if not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in WEIGHTS):
        raise UserError(
            f"{key}: {folder} needs {CONFIG} and {WEIGHTS[0]} (or {WEIGHTS[2]}), as transformers save them."
        )
    return folder


def find_folder(key: str, name: str) -> Path:
    """The folder `name`, or the newest snapshot of the hub id `name` in the local cache.

    Raises UserError, which names the recipe's `key`, where there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise UserError(
            f"{key}: {name} is neither a folder here nor in the local Hugging Face cache.\n"
            f"Fetch it once with `hf download {name}`, or name a folder that holds its files."
        ) from None


def find_tokenizer(config: JointEmbedderConfig, file: Path) -> Path:
    """The folder with the tokenizer of LAION's checkpoint `file`: the one that the recipe names, the file's own, or the
    hub's in the local cache. Raises UserError, which says what to fetch, where there is none.
    """
    key = "encoders.joint.tokenizer"
    if config.tokenizer:
        folder = find_folder(key, config.tokenizer)
        if not _has_vocabulary(folder):
            raise UserError(f"{key}: {folder} holds neither {' nor '.join(TOKENIZER_FILES[:2])}.")
        return folder
    if _has_vocabulary(file.parent):
        return file.parent
    for name in TOKENIZERS:
        try:
            return find_folder(key, name)
        except UserError:
            continue
    raise UserError(
        f"{key}: {file.name} needs RoBERTa's tokenizer, neither beside it nor in the local Hugging Face cache.\n"
        f"Fetch it once with `hf download {TOKENIZERS[0]}`, or name a folder with its vocab.json and merges.txt."
    )


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def weights_digest(config: EncoderConfig) -> str:
    """16 hex digits: of the bytes of a file or in a folder, or of a hub id and its revision in the local cache; and of
    the tokenizer, where it is kept apart. Raises UserError where `find_weights` does.
    """
    name, source = weights_name(config), find_weights(config)
    if source.is_file():
        # Its name says nothing about its weights; in a folder it says which file is which.
        words = find_tokenizer(config, source) if isinstance(config, JointEmbedderConfig) else None
        files = [words / file for file in TOKENIZER_FILES if (words / file).is_file()] if words else []
        return fingerprint(_digest(source), {file.name: _digest(file) for file in files})
    if source != Path(name).expanduser():
        return fingerprint(name, source.name)  # the cache names a snapshot by its revision
    files = [file for file in sorted(source.iterdir()) if file.suffix in READ_SUFFIXES]
    return fingerprint({file.name: _digest(file) for file in files})


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(path: Path, size: int, modified: int) -> str:
    """Gigabytes are read once a process: they are asked for by several stages."""
    return file_digest(path)


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
        raise UserError(
            f"{weights_key(kind)}: the weights in {folder} do not load: they are damaged, or hold more than tensors, "
            f"which is never loaded. ({str(error).splitlines()[0]})"
        ) from None
    missing = [*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{weights_key(kind)}: {folder} is not a {model_class.__name__}: {len(missing)} tensors are missing or of "
            f"another shape, among them {missing[0]}."
        )
    return ready(model)


def ready(model: Any) -> Any:
    """`model` for inference, on the GPU where there is one."""
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def read_json(kind: str, folder: Path, name: str) -> dict[str, Any]:
    """The JSON file `name` of a weights folder. Raises UserError where it is missing or damaged."""
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError):
        raise UserError(f"{weights_key(kind)}: {folder / name} is missing or damaged.") from None


def save_note(folder: Path, config: EncoderConfig) -> None:
    """Writes which weights were used: pretrained weights are not copied into artifacts."""
    note = {
        "kind": config.kind,
        "weights": weights_name(config),
        "digest": weights_digest(config),
        "files": weights_files(config),
        "get": how_to_get(config),
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def check_note(folder: Path, config: EncoderConfig) -> None:
    """Raises UserError where a file of the weights that `config` finds here is not the one that the note in `folder`
    speaks of: codes and embeddings would mean something else."""
    if not (folder / NOTE).is_file():
        return
    note = json.loads((folder / NOTE).read_text())
    noted = note.get("files", {})  # those of earlier versions are not listed
    if not noted:
        return
    here = weights_files(config)
    if len(here) == 1 and len(noted) == 1:  # the name of a single file says nothing
        same = set(here.values()) == set(noted.values())
    else:
        common = here.keys() & noted.keys()
        same = bool(common) and all(here[name] == noted[name] for name in common)
    if not same:
        raise UserError(
            f"{weights_key(config.kind)}: the weights of {weights_name(config)} here are not those that {folder} was "
            f"made with. {note['get']}"
        )


def weights_files(config: EncoderConfig) -> dict[str, str]:
    """SHA-256 of the files that hold the weights, by name. Raises UserError where `find_weights` does."""
    source = find_weights(config)
    if source.is_file():
        return {source.name: _digest(source)}
    return {file.name: _digest(file) for file in sorted(source.iterdir()) if file.suffix in (".safetensors", ".bin")}


def how_to_get(config: EncoderConfig) -> str:
    """A sentence on where the weights come from."""
    name = weights_name(config)
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return f"Fetch them with `hf download {name}`."
    if Path(name).suffix in FILE_SUFFIXES and config.kind in OWN_FILES:
        return f"They are the file {Path(name).name}. {OWN_FILES[config.kind]}"
    return f"They are files in a folder called {Path(name).name}; ask whoever made this for it."
