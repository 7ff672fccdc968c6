"""The one seam to DeepSpeed: configuration, process group, training step, weights and checkpoints.

DeepSpeed is imported here and nowhere else.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import ds_configs
from model.config import ExecutionConfig
from model.dropping import Dropped
from model.initialisation import parameter_groups
from model.stage import Batch, StageTransformer
from trainer.config import TrainConfig

log = logging.getLogger(__name__)

MicroBatch = Batch | list[Batch]
"""Windows of one length together, or windows to be packed, each a batch of one."""

TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer has lost a rank: the job ends rather than hangs."""


def start_process_group() -> None:
    """Joins the ranks the launcher started, over NCCL where there are GPUs and gloo elsewhere."""
    # The deepspeed launcher sets LOCAL_SIZE; mosaicml-streaming reads LOCAL_WORLD_SIZE.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))
    # DeepSpeed would compile a shared-memory all-reduce first, a minute on a small machine, that inference alone uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, auto_mpi_discovery=False, verbose=False)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed file a recipe names, with what the recipe decides filled in."""
    micro_batch = config.micro_batch or config.global_batch // world_size
    return {
        **ds_configs.read(config.zero),
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // (micro_batch * world_size),
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 1_000_000_000,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.betas),
                "eps": 1e-8,
                "torch_adam": not torch.cuda.is_available(),  # the fused CPU op would be compiled first
            },
        },
    }


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up, then a half cosine to the final share."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.final_learning_rate + (1 - config.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def execution(config: TrainConfig) -> ExecutionConfig:
    """How the blocks are computed: as the recipe says, but not compiled where ZeRO-3 fetches weights by hooks, nor
    where the length of packed windows changes with every step."""
    if config.packing and config.compile == "auto":
        log.info("compile: off, since packed windows are of another length each step")
    zero3 = ds_configs.zero_stage(config.zero) == 3
    return config.model_copy(update={"compile": "off"}) if zero3 or config.packing else config


def predicted_frames(batch: MicroBatch, field: str) -> int:
    """Frames of the predicted `field` in all windows of a micro batch; each has a code of every predicted quantizer."""
    windows = batch if isinstance(batch, list) else [batch]
    return sum(window[field].shape[:2].numel() for window in windows)


class Engine:
    """A stage under DeepSpeed ZeRO."""

    def __init__(self, model: StageTransformer, config: TrainConfig) -> None:
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        settings = deepspeed_config(config, self.world_size)
        self.micro_batch: int = settings["train_micro_batch_size_per_gpu"]
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(
                model, model.config.transformer, config.learning_rate, config.weight_decay
            ),
            config=settings,
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate_factor(config, step)),
        )

        self.module.configure(execution(config))

    @property
    def module(self) -> StageTransformer:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def learning_rate(self) -> float:
        return max(self._engine.get_lr())  # with μP wide matrices have a lower one

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def train_step(self, micro_batches: list[tuple[MicroBatch, Dropped | list[Dropped]]]) -> Tensor:
        """One optimizer step over `accumulation` pairs of a micro batch and what it does without.

        What is minimised is the mean over all codes of the step, those of all micro batches and ranks. Returns this
        rank's part of it for each quantizer, still on the device: the mean over the ranks is that mean.
        """
        total = torch.zeros(len(self.module.quantizers), device=self._engine.device)
        weights = self.weights([batch for batch, _ in micro_batches])
        for (batch, dropped), weight in zip(micro_batches, weights, strict=True):
            losses = self._engine(batch, dropped) * weight
            self._engine.backward(losses.mean())
            self._engine.step()
            total += losses.detach()
        return total / len(micro_batches)

    def weights(self, batches: Sequence[MicroBatch]) -> Tensor:
        """What each of `batches` counts for, `[batches]`, with a mean of 1 over all ranks, which have equally many.

        Packed ones count by their codes, so that the mean of their means is the mean over all codes; windows of one
        length count alike. All ranks must call it.
        """
        if not isinstance(batches[0], list):
            return torch.ones(len(batches), device=self._engine.device)
        frames = [float(predicted_frames(batch, self.module.config.field)) for batch in batches]
        counts = torch.tensor(frames, device=self._engine.device)
        return counts / self.mean(counts.mean())

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Loss of each quantizer with every condition present. Nothing of the training state is switched or changed."""
        with torch.no_grad():
            return self._engine(batch)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over the ranks."""
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; every rank learns the same answer."""
        value = torch.tensor([int(flag)], dtype=torch.int32, device=self._engine.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, device=self._engine.device)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 value of every parameter, gathered one at a time. All ranks must iterate."""
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            # Without ZeRO and in fp32 the parameter itself is the master copy.
            yield name, (parameter if full is None else full).detach().float().cpu().clone()

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Writes every rank's share of weights and optimizer under `folder`. All ranks must call it."""
        self._engine.save_checkpoint(str(folder), tag="engine", client_state=client_state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Takes back what `save` wrote and returns its client state. The folder's digests must have been checked."""
        path, client_state = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        return client_state
