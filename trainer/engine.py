"""The seam to DeepSpeed: process group, training step, collectives. `trainer.fragments` is its other half, for state.

DeepSpeed is imported in these two and nowhere else.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

import ds_configs
from data.network import use_interface
from model.config import ExecutionConfig
from model.dropping import Dropped
from model.initialisation import parameter_groups
from model.stage import Batch, StageTransformer
from trainer.config import TrainConfig
from trainer.deepspeed_settings import check_precision, deepspeed_config, swap_folders
from trainer.fragments import Fragment, fragments, gathered, replicated, set_updates, unseen_norm, updates
from trainer.optimizer import AVERAGE, AdamW
from trainer.spikes import SpikeGuard
from trainer.stopwatch import Stopwatch
from trainer.tensor_files import WEIGHTS

log = logging.getLogger(__name__)

MicroBatch = Batch | list[Batch]
"""Windows of one length together, or windows to be packed, each a batch of one."""


def start_process_group(timeout: float = 600.0) -> str | None:
    """Joins the ranks the launcher started, over NCCL where there are GPUs and gloo elsewhere. Returns the network
    interface that was chosen for it, if any had to be.

    A collective that takes longer than `timeout` seconds has lost a rank: the job ends rather than hangs.
    """
    # The deepspeed launcher sets LOCAL_SIZE; mosaicml-streaming reads LOCAL_WORLD_SIZE.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))
    # DeepSpeed would compile a shared-memory all-reduce first, a minute on a small machine, that inference alone uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    interface = use_interface()
    deepspeed.init_distributed(
        dist_backend=backend, timeout=timedelta(seconds=timeout), auto_mpi_discovery=False, verbose=False
    )
    return interface


def lost_a_rank(error: Exception) -> bool:
    """Whether `error` says that another rank was lost, not that something is wrong with this one."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
    """A stage under DeepSpeed ZeRO. What an NVMe file moves out of memory lies in `swap_folder`, or below a folder that
    the file names."""

    def __init__(self, model: StageTransformer, config: TrainConfig, swap_folder: Path | None = None) -> None:
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        check_precision(config, torch.cuda.get_device_capability() if device().type == "cuda" else None)
        settings = deepspeed_config(config, self.world_size, swap_folder)
        self._swap = {swap_folder, *swap_folders(config, swap_folder).values()} if swap_folder else set()
        self.clear_swap()
        self.micro_batch: int = settings["train_micro_batch_size_per_gpu"]
        self.accumulation: int = settings["gradient_accumulation_steps"]
        groups = parameter_groups(model, model.config.transformer, config.learning_rate, config.weight_decay)
        self._optimizer = AdamW(groups, config.learning_rate, config.betas, config.clip, config.ema_decay, device())
        weights_go_to = settings["zero_optimization"].get("offload_param", {}).get("device")
        if config.precision == "fp32" and weights_go_to == "nvme":
            # Left to itself, DeepSpeed would move fp32 weights in bf16 where the CPU cannot compute in fp16.
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=settings)
        if self._engine.zero_optimization_stage() in (1, 2):
            # DeepSpeed looks for the state of all groups once the first has stepped, and never again.
            for _ in fragments(self._engine, self._optimizer):
                pass
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        if not replicated(self._engine):
            self._optimizer.norm = unseen_norm(self._engine.optimizer)
        # Decisions travel over gloo, beside whatever the devices are doing.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.collective_timeout))
        self.module.configure(execution(config))
        self.forward_time = Stopwatch(self.device)
        """Spent in the forward passes of training."""

    def destroy(self) -> None:
        """Gives back the memory, once the last reference to it is gone. All ranks must call it."""
        self._engine.destroy()
        # Under ZeRO-3 two places that outlive an engine keep its model: a cache of a class, and a global list.
        wrapper = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
        inspect.getclosurevars(wrapper).nonlocals["func"].cache_clear()
        parameter_offload.FWD_MODULE_STACK.clear()
        dist.destroy_process_group(self._control)

    def clear_swap(self) -> None:
        """Removes what is on NVMe, which a killed job leaves too. All ranks must call it; none can train any more."""
        dist.barrier()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # on every host, since each may have its own disk
            for folder in self._swap:
                shutil.rmtree(folder, ignore_errors=True)  # on a shared disk another host may be as far
        dist.barrier()

    @property
    def module(self) -> StageTransformer:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self._optimizer.average_decay is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, whole, whatever this rank holds of it."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.module.named_parameters()
        }

    def set_learning_rate(self, factor: float) -> float:
        """Lets the next step learn at `factor` of the recipe's rates; returns the highest (μP has lower ones too)."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return max(self._rates) * factor

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping; infinite where that was not finite."""
        norm = float(self._optimizer.last_norm)
        return norm if norm >= 0 else float("inf")

    def train_step(
        self, micro_batches: list[tuple[MicroBatch, Dropped | list[Dropped]]], guard: SpikeGuard | None = None
    ) -> Tensor:
        """One optimizer step over `accumulation` pairs of a micro batch and what it does without.

        What is minimised is the mean over all codes of the step, those of all micro batches and ranks. Returns that
        mean for each quantizer, still on the device. A step whose loss `guard` finds bad, or whose gradient is not
        finite, leaves the weights and the optimizer's state as they are.
        """
        total = torch.zeros(len(self.module.quantizers), device=self._engine.device)
        weights = self.weights([batch for batch, _ in micro_batches])
        for number, ((batch, dropped), weight) in enumerate(zip(micro_batches, weights, strict=True), start=1):
            with self.forward_time.running():
                losses = self._engine(batch, dropped) * weight
            self._engine.backward(losses.mean())
            total += losses.detach()
            if number == len(micro_batches):
                total = self.mean(total / len(micro_batches))
                self._optimizer.judge(guard.judge(total.mean()) if guard else torch.zeros_like(total[0]))
            self._engine.step()
        if guard:
            guard.record(total.mean(), self._optimizer.skipped)
        return total

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
        """Loss and accuracy of each quantizer, `[2, quantizers]`, with every condition present. Nothing of the training
        state is switched or changed."""
        with torch.no_grad():
            return self._engine(batch, accuracy=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over the ranks, on the device."""
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def most(self, *values: int) -> list[int]:
        """The largest of each of `values` over the ranks, the same on all of them."""
        box = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._control)
        return box.tolist()

    def sum(self, *values: int) -> list[int]:
        """The sum of each of `values` over the ranks, the same on all of them."""
        box = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(box, group=self._control)
        return box.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._control)
        return box

    def barrier(self) -> None:
        dist.barrier(group=self._control)

    def full_weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 value of every parameter, or of its average, gathered one at a time to the host.

        All ranks must iterate.
        """
        key = AVERAGE if average else WEIGHTS
        if replicated(self._engine):
            for fragment in fragments(self._engine, self._optimizer):
                shape = self.module.get_parameter(fragment.name).shape
                yield fragment.name, fragment.tensors[key].view(shape).cpu().clone()
        elif self._engine.zero_optimization_stage() == 3:
            for name, full in gathered(self._engine, self._optimizer, key):
                yield name, full.cpu().clone()
        else:
            for name, parameter in self.module.named_parameters():
                full = safe_get_full_optimizer_state(parameter, key) if average else safe_get_full_fp32_param(parameter)
                yield name, full.detach().float().cpu().clone()

    def held(self) -> Iterator[Fragment]:
        """What this rank is to write of the weights and the optimizer's state: together the ranks write all, once."""
        for fragment in fragments(self._engine, self._optimizer):
            yield fragment.share(self.rank, self.world_size) if replicated(self._engine) else fragment

    def needed(self) -> Iterator[Fragment]:
        """What this rank needs of them, to be filled in. All ranks must iterate to the end."""
        return fragments(self._engine, self._optimizer, change=True)

    @property
    def updates(self) -> int:
        """How often the weights were changed."""
        return updates(self._optimizer)

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates(self._optimizer, count)
