"""What DeepSpeed is told: the file a recipe names, with what the recipe decides filled in. Imports neither torch nor
DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ds_configs
from model import artifact
from model.errors import UserError
from trainer.config import TrainConfig

NEVER = 1_000_000_000
OFFLOADS = ("offload_optimizer", "offload_param")
BF16_CAPABILITY = 8
"""CUDA compute capability (Ampere) from which on GPUs have bf16."""


def deepspeed_config(config: TrainConfig, world_size: int, swap_folder: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed file a recipe names, with what the recipe decides filled in for `world_size` ranks.

    What an NVMe file moves out of memory lies in `swap_folders`. Raises UserError as `check_deepspeed` does, and where
    no folder is known.
    """
    check_deepspeed(config, world_size)
    settings = ds_configs.read(config.zero)
    _fill_offload(settings["zero_optimization"], config, swap_folder)
    micro_batch = config.windows_a_pass(world_size)
    return {
        **settings,
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // (micro_batch * world_size),
        # The optimizer clips, and leaves out what is not finite: DeepSpeed would wait for the device to look at it.
        "gradient_clipping": 0.0,
        "bf16": {"check_grad_overflow": False, **settings.get("bf16", {}), "enabled": config.precision == "bf16"},
        "steps_per_print": NEVER,
        # The optimizer is ours and handed over as an object, for offloaded weights too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def check_deepspeed(config: TrainConfig, world_size: int) -> None:
    """Raises UserError where the DeepSpeed file is not sound, or says something else than the recipe, or the batch does
    not divide over `world_size` ranks."""
    settings = ds_configs.read(config.zero)
    for key, value, decided, origin in _decided(settings, config, world_size):
        if value not in (None, decided):
            raise UserError(
                f"{config.zero}: {key} is {_json(value)}, but the recipe says {_json(decided)} ({origin}): "
                "change one of them, or remove the key from the file."
            )
    ranks = world_size * config.windows_a_pass(world_size)
    if config.global_batch % ranks:
        raise UserError(
            f"train.global_batch {config.global_batch} does not divide over {world_size} ranks with "
            f"{ranks // world_size} windows each: make it a multiple of {ranks}, or change train.micro_batch."
        )
    offload = settings["zero_optimization"].get("offload_optimizer", {})
    needed = _swap_buffers(config, offload)
    if offload.get("device") == "nvme" and offload.get("buffer_count", needed) < needed:
        raise UserError(
            f"{config.zero}: zero_optimization.offload_optimizer.buffer_count is {offload['buffer_count']}: "
            f"this recipe needs {needed}. Leave the key out and it gets them."
        )


def check_precision(config: TrainConfig, capability: tuple[int, int] | None) -> None:
    """Raises UserError where a GPU of that CUDA compute capability has no bf16 to train in; a CPU (None) has."""
    if config.precision == "bf16" and capability is not None and capability[0] < BF16_CAPABILITY:
        raise UserError(
            f"train.precision is bf16, which a GPU of compute capability {capability[0]}.{capability[1]} does not have "
            f"({BF16_CAPABILITY}.0 and later do): set train.precision=fp32."
        )


def _decided(settings: dict[str, Any], config: TrainConfig, world_size: int) -> Iterator[tuple[str, Any, Any, str]]:
    """Key, value in the file (None: not said), value by the recipe, and the recipe's keys that decide it."""
    micro_batch, accumulation = config.micro_batch, config.micro_batch
    if config.micro_batch != "auto":  # else nobody knows yet
        micro_batch = config.windows_a_pass(world_size)
        accumulation = config.global_batch // (micro_batch * world_size)
    for key, decided, origin in [
        ("train_batch_size", config.global_batch, "train.global_batch"),
        ("train_micro_batch_size_per_gpu", micro_batch, "train.micro_batch"),
        ("gradient_accumulation_steps", accumulation, "train.global_batch and train.micro_batch"),
        ("gradient_clipping", config.clip, "train.clip"),
        ("steps_per_print", config.log_every, "train.log_every"),
    ]:
        yield key, settings.get(key), decided, origin
    yield "bf16.enabled", settings.get("bf16", {}).get("enabled"), config.precision == "bf16", "train.precision"


def swap_folders(config: TrainConfig, swap_folder: Path) -> dict[str, Path]:
    """Where each section of the file that says "nvme" puts what it moves there: `swap_folder`, or below the folder that
    the file names one that is `swap_folder`'s alone, since stages that train side by side use the same file names."""
    zero = ds_configs.read(config.zero)["zero_optimization"]
    own = f"stretto-{artifact.fingerprint(str(swap_folder.absolute()))}"
    sections = {name: zero[name] for name in OFFLOADS if zero.get(name, {}).get("device") == "nvme"}
    return {
        name: Path(section["nvme_path"]) / own if "nvme_path" in section else swap_folder
        for name, section in sections.items()
    }


def _fill_offload(zero: dict[str, Any], config: TrainConfig, swap_folder: Path | None) -> None:
    folders = swap_folders(config, swap_folder) if swap_folder else {}
    for name in OFFLOADS:
        section = zero.get(name, {})
        if section.get("device") != "nvme":
            continue
        if name in folders:
            section["nvme_path"] = str(folders[name])
        elif "nvme_path" not in section:
            raise UserError(f"{config.zero}: zero_optimization.{name}.nvme_path is missing: name a folder.")
        if name == "offload_optimizer":
            section.setdefault("buffer_count", _swap_buffers(config, section))


def _swap_buffers(config: TrainConfig, offload: dict[str, Any]) -> int:
    """Buffers for one piece of the weights: itself, its gradient, two moments, and the average where one is kept; as
    many again for the next piece where it is read ahead, and for the last one where it is written meanwhile."""
    pieces = 1 + offload.get("pipeline_read", False) + offload.get("pipeline_write", False)
    return pieces * (4 if config.ema_decay is None else 5)


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
