"""Bytes of one rank while it trains, by formula, for any DeepSpeed file. Imports no torch.

docs/plan.md states the formulas; a test compares them with the tensors that DeepSpeed's engine holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainer.config import TrainConfig

BUCKET, LIVE, SUB_GROUP = 5e8, 1e9, 1e9
"""What DeepSpeed takes, in numbers, where its file names no bucket, most live parameters or sub-group."""
OPTIMIZER_SWAPS, PARAMETER_SWAPS, PARAMETER_SWAP = 4, 5, 1e8
"""The same for the buffers in front of an NVMe: how many of each kind, and the numbers in one of parameters."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at most; `host` and `nvme` lie outside the GPU."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float = 0
    """Gradients on their way between ranks and, under ZeRO-3, the weights that are gathered at a time."""
    activations: float = 0
    host: float = 0
    nvme: float = 0

    @property
    def states(self) -> float:
        """Model states on the GPU."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All that is on the GPU."""
        return self.states + self.buffers + self.activations


def offloads(zero: dict[str, Any], what: str) -> str | None:
    """Where a `zero_optimization` section puts the `optimizer` or the `param`: cpu, nvme, or None for the GPU."""
    device = zero.get(f"offload_{what}", {}).get("device", "none")
    return None if device == "none" else device


def width(train: TrainConfig) -> int:
    """Bytes of a weight as the forward pass takes it."""
    return 2 if train.precision == "bf16" else 4


def optimizer_bytes(train: TrainConfig, stage: int) -> int:
    """Bytes a parameter of the optimizer's states: two moments, the average of `ema_decay`, and an fp32 copy of the
    weights except where they are fp32 and not sharded."""
    master = 0 if stage == 0 and train.precision == "fp32" else 4
    return master + 8 + (4 if train.ema_decay else 0)


def checkpoint_bytes(train: TrainConfig) -> int:
    """Bytes a parameter of a checkpoint, of all ranks together: fp32 weights, both moments and the average."""
    return 4 + 8 + (4 if train.ema_decay else 0)


def model_memory(parameters: int, train: TrainConfig, zero: dict[str, Any], ranks: int, accumulation: int) -> Memory:
    """One of `ranks` ranks under the `zero_optimization` section of a DeepSpeed file, activations left out.

    ZeRO-1 shares the optimizer's states among the ranks, ZeRO-2 the gradients too and ZeRO-3 the weights too
    (Rajbhandari et al. 2020). Gradients are those at the optimizer step, with the fp32 copy that the optimizer is
    given, and the whole ones that ZeRO-1 keeps from one micro batch to the next.
    """
    stage, wide = zero["stage"], width(train)
    if stage == 0:
        whole = wide * parameters + (4 * parameters if wide == 2 else 0)
        bucket = wide * min(parameters, BUCKET) if ranks > 1 else 0
        return Memory(wide * parameters, whole, optimizer_bytes(train, 0) * parameters, bucket)
    share = parameters / ranks
    stepped = min(share, zero.get("sub_group_size", SUB_GROUP)) if stage == 3 else share
    gradients: float = wide * share + 4 * stepped
    if stage == 1 and accumulation > 1:
        gradients = max(gradients, wide * (parameters + share))
    buffers: float = (
        wide * zero.get("reduce_bucket_size", BUCKET) * (2 if stage < 3 and zero.get("overlap_comm") else 1)
    )
    if stage == 3:
        buffers += wide * min(parameters, zero.get("stage3_max_live_parameters", LIVE))
    weights = wide * (share if stage == 3 else parameters)
    memory = Memory(weights, gradients, optimizer_bytes(train, stage) * share, buffers)
    # On the host: gradients as they were reduced. ZeRO-2 has the new weights there, and gradients if it adds some up.
    reduced = wide * share * (2 if stage < 3 and accumulation > 1 else 1)
    return _parameters_offloaded(_optimizer_offloaded(memory, zero, reduced, 4 * share, 4 * stepped), zero, wide)


def _optimizer_offloaded(memory: Memory, zero: dict[str, Any], reduced: float, full: float, stepped: float) -> Memory:
    """With the optimizer's states and the gradients, `reduced` and in fp32, in the host's memory or on an NVMe."""
    device = offloads(zero, "optimizer")
    if device is None:
        return memory
    off = replace(memory, gradients=0, optimizer=0)
    if device == "nvme":
        swaps = zero["offload_optimizer"].get("buffer_count", OPTIMIZER_SWAPS)
        return replace(off, host=reduced + swaps * stepped, nvme=memory.optimizer + full)
    return replace(off, host=reduced + full + memory.optimizer)


def _parameters_offloaded(memory: Memory, zero: dict[str, Any], wide: int) -> Memory:
    device = offloads(zero, "param")
    if device is None:
        return memory
    off = replace(memory, weights=0)
    if device == "nvme":
        settings = zero["offload_param"]
        numbers = settings.get("buffer_count", PARAMETER_SWAPS) * settings.get("buffer_size", PARAMETER_SWAP)
        return replace(off, host=memory.host + wide * numbers, nvme=memory.nvme + memory.weights)
    return replace(off, host=memory.host + memory.weights)
