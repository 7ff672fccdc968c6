"""A checkpoint of `transformers` as a stage of a bundle: what was trained or fine-tuned elsewhere makes music again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from model import artifact
from model.artifact import CARD
from model.bundle import KIND as BUNDLE
from model.bundle import open_bundle, stage_file
from model.errors import UserError
from model.saving import save_tensors
from model.stock.bundles import stage_called, stage_of
from model.stock.layout import BLOCK, FORMAT_VERSION, NOT_SHAPE, config_json
from model.stock.weights import from_tensors, read_tensors, weight_files

CONFIG = "config.json"
SPARE_BYTES = 1 << 20
"""For headers, the manifest and the card."""
STOCK_KINDS = ("llama", "qwen3")


def import_stage(checkpoint: Path, bundle_path: Path, name: str, output: Path) -> None:
    """Writes to the new folder `output` the bundle with stage `name` replaced by the weights of `checkpoint`.

    The checkpoint's ids, shapes and clock must be those of the bundle's stage; only the weights differ. They are kept
    in fp32. Raises UserError where they do not fit, a file is missing, damaged or a pickle, the bundle is not whole or
    the disk has too little room.
    """
    stage_name, config = stage_called(name), read_config(checkpoint)
    bundle = open_bundle(bundle_path, verify=True)
    stage = stage_of(bundle, stage_name)
    copied = sum(file["bytes"] for name, file in bundle.manifest["files"].items() if name != stage_file(stage_name))
    artifact.require_room(output, copied + sum(value.nbytes for value in stage.state_dict().values()) + SPARE_BYTES)
    check_config(checkpoint / CONFIG, config, config_json(stage, stage_name))
    stage.load_state_dict(from_tensors(stage, read_tensors(checkpoint), checkpoint))
    sources = {file.name: artifact.file_digest(file) for file in weight_files(checkpoint)}
    origin = artifact.fingerprint(bundle.fingerprint, stage_name, sources)
    with artifact.create(output, BUNDLE, origin, bundle.manifest["inputs"]) as (folder, info):
        weights = stage_file(stage_name)
        for file in bundle.manifest["files"].keys() - {weights, CARD}:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, folder / file)
        save_tensors(stage.state_dict(), folder / weights)
        info.update(bundle.info, imported={**bundle.info.get("imported", {}), stage_name: sources})
        for told in ("verified", "training"):  # of the stage that was there before
            info[told] = {key: value for key, value in info.get(told, {}).items() if key != stage_name}
        before = bundle.path / CARD
        card = before.read_text() if before.is_file() else f"# The bundle {bundle.path.name}\n"
        note = (
            f"\nThe weights of the stage `{stage_name}` were imported from a checkpoint of `transformers`: what is "
            "said above of its training is not of these.\n"
        )
        (folder / CARD).write_text(card + note)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """`config.json` of a stage that was exported once. Raises UserError for anything else."""
    file = checkpoint / CONFIG
    try:
        config = json.loads(file.read_text())
        version = config[BLOCK]["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint} is no checkpoint of transformers: it has no {CONFIG}.") from None
    except ValueError:
        raise UserError(f"{file} is damaged: it does not read as JSON.") from None
    except (LookupError, TypeError):
        raise UserError(
            f"{file} has no block {BLOCK!r}, which says what the ids mean: start from a stage that "
            "`stretto export-transformers` wrote, and keep its config.json."
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format version {version}; this Stretto reads {FORMAT_VERSION}: upgrade it.")
    return config


def check_config(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises UserError, which names the first key, where a checkpoint is not of the stage that is `expected`."""
    of, name = found[BLOCK].get("stage"), expected[BLOCK]["stage"]
    if of != name:
        raise UserError(f"{file}: the checkpoint is of stage {of!r}, and --stage names {name!r}.")
    for key, theirs, ours in differences(settings(found), expected):
        raise UserError(
            f"{file}: {key} is {theirs!r} and that of the bundle's stage is {ours!r}: they do not fit together."
        )


def differences(found: Any, expected: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values are not those of `expected`, which may have fewer keys: `(key, found, expected)`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [key for key in expected if key not in NOT_SHAPE]:
            yield from differences(found.get(key), expected[key], f"{path}.{key}" if path else key)
    elif found != expected:
        yield path, found, expected


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the values that transformers leaves out where they are its own, as version 4 writes them: version 5
    has one mapping of what is said of rotary positions."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": settings(config["text_config"])}
    kind = config.get("model_type")
    defaults = AutoConfig.for_model(kind).to_dict() if kind in STOCK_KINDS else {}
    if "rope_theta" in config:  # as version 4 writes them, whichever reads this
        defaults.pop("rope_parameters", None)
    config = {**defaults, **config}
    if isinstance(rope := config.pop("rope_parameters", None), dict):
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope.get("rope_theta")
        config["rope_scaling"] = None if rest == {"rope_type": "default"} else rest
    return config
