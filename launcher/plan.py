"""`stretto plan` in numbers: what the stages of a recipe cost on a number of GPUs, by formula. Imports no torch.

docs/plan.md states the formulas; `launcher.plan_tables` shows what they give.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ds_configs
from launcher.plan_memory import Memory, checkpoint_bytes, model_memory, offloads, width
from launcher.recipe import Recipe
from launcher.units import size
from model.counting import StageCount, activation_bytes, count_stage, token_fields
from model.errors import UserError, nearest
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField
from trainer import hardware
from trainer.config import StageConfig, TrainConfig
from trainer.hardware import Gpu

USABLE = 0.9
"""Share of a GPU's memory that training may take: the rest is for CUDA, NCCL and gaps between tensors."""
SEMANTIC_DIMS = {"mel_chroma": 92, "mert": 768, "hubert": 768}
"""Width of the semantic features by kind, of which the centroids of a summed condition have the same."""
DAY = 86_400


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a plan is made for, and what they are assumed to reach."""

    gpu: Gpu
    gpus: int | None
    """GPUs of each stage; those of the recipe where None."""
    mfu: float

    @classmethod
    def of(cls, gpu: str, gpus: int | None, mfu: float) -> Cluster:
        """Raises UserError for a GPU that is not known, and for numbers that make no sense."""
        found = hardware.find(gpu)
        if found is None:
            names = [known.name.replace(" ", "-").lower() for known in hardware.GPUS]
            hint = nearest(gpu.lower(), names)
            raise UserError(f"there is no GPU {gpu!r} in the table.{hint} Choose one of {', '.join(names)}.")
        if gpus is not None and gpus < 1:
            raise UserError(f"--gpus is {gpus}: name 1 or more.")
        if not 0 < mfu <= 1:
            raise UserError(f"--mfu is {mfu:g}: name a share of the peak above 0 and at most 1, such as 0.4.")
        return cls(found, gpus, mfu)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training may take."""
        return USABLE * self.gpu.memory


@dataclass(frozen=True)
class Choice:
    """One ZeRO choice for a stage: a file of ds_configs/, or the one that the recipe names."""

    name: str
    stage: int
    offloads: tuple[str | None, ...]
    """Where the optimizer and the weights are: cpu, nvme, or None for the GPU."""
    memory: Memory
    usable: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def cost(self) -> tuple[float, ...]:
        """What makes it slower than another, worst first: an NVMe, the host's memory, traffic between ranks. Where
        that is the same, as it is under ZeRO-0 and 1, the memory it takes."""
        return "nvme" in self.offloads, any(self.offloads), max(self.stage, 1), self.memory.total


@dataclass(frozen=True)
class Advice:
    """The choice to take, and why; None where nothing fits."""

    choice: Choice | None
    micro_batch: int
    reason: str


@dataclass(frozen=True)
class StagePlan:
    """What training one stage costs."""

    name: str
    config: StageConfig
    count: StageCount
    cluster: Cluster
    window_activations: int
    """Bytes that one window's forward pass keeps."""
    micro_batch: int
    """Windows of a rank and forward pass."""

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def gpus(self) -> int:
        return self.cluster.gpus or self.train.ranks

    @property
    def accumulation(self) -> int:
        return self.train.global_batch // (self.micro_batch * self.gpus)

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs for each token predicted; positions that only condition are part of their price."""
        return self.count.training_flops / self.count.tokens

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.count.tokens

    @property
    def step_flops(self) -> int:
        return self.train.global_batch * self.count.training_flops

    @property
    def flops(self) -> int:
        return self.train.steps * self.step_flops

    @property
    def windows(self) -> int:
        return self.train.steps * self.train.global_batch

    def seconds(self, rank_flops: float) -> float:
        """Training time at a given speed of one rank, in FLOP/s; validation and checkpoints come on top."""
        return self.flops / (self.gpus * rank_flops)

    @property
    def gpu_seconds(self) -> float:
        """Training time at the assumed share of the GPU's peak."""
        peak = self.cluster.gpu.peak(self.train.precision)
        assert peak is not None  # plan_stages has checked
        return self.seconds(self.cluster.mfu * peak)

    @property
    def checkpoint_bytes(self) -> float:
        """One checkpoint, of all ranks together."""
        return checkpoint_bytes(self.train) * self.count.parameters

    @property
    def disk_bytes(self) -> float:
        """The checkpoints kept, one more while the next is being written, and the final weights in fp32."""
        kept = self.train.keep_last + 1 + (self.train.keep_best is not None)
        if self.train.keep_every:
            kept += self.train.steps // self.train.keep_every
        return kept * self.checkpoint_bytes + 4 * self.count.parameters

    def choice(self, name: str) -> Choice:
        """The ZeRO choice of a file at this micro batch."""
        zero = ds_configs.read(name)["zero_optimization"]
        memory = model_memory(self.count.parameters, self.train, zero, self.gpus, self.accumulation)
        kept = self.micro_batch * self.window_activations * width(self.train) / 2
        where = offloads(zero, "optimizer"), offloads(zero, "param")
        return Choice(name, zero["stage"], where, replace(memory, activations=kept), self.cluster.usable)

    @property
    def choices(self) -> list[Choice]:
        """Every ZeRO choice there is, with that of the recipe: those on the GPU first, by stage."""
        names = dict.fromkeys([*ds_configs.names(), self.train.zero])
        return sorted(map(self.choice, names), key=lambda choice: (*choice.cost[:2], choice.stage))

    def smaller(self) -> Iterator[StagePlan]:
        """The plan at this micro batch and at each smaller one that divides the batch of a rank, largest first."""
        of_a_rank = self.train.global_batch // self.gpus
        return (replace(self, micro_batch=micro) for micro in divisors(of_a_rank)[::-1] if micro <= self.micro_batch)

    @property
    def advice(self) -> Advice:
        """The fastest choice that fits on the GPU, for which micro batches may be smaller; else one that offloads."""
        plans = [(plan, plan.choices) for plan in self.smaller()]
        for offloading in (False, True):
            for plan, choices in plans:
                fitting = [choice for choice in choices if choice.fits and any(choice.offloads) == offloading]
                if fitting:
                    fastest = min(fitting, key=lambda choice: choice.cost)
                    return Advice(fastest, plan.micro_batch, self._reason(fastest))
        least = min((choice for _, choices in plans for choice in choices), key=lambda choice: choice.memory.total)
        return Advice(None, 1, f"nothing fits: {least.name} takes {size(least.memory.total)} with one window at a time")

    def _reason(self, choice: Choice) -> str:
        room = f"{size(choice.memory.total)} of the {size(self.cluster.usable)} that may be used"
        if any(choice.offloads):
            return f"{room}; on the GPU alone nothing fits, so expect it to be slow"
        return f"{'one GPU shares with none' if self.gpus == 1 else 'the least traffic of those that fit'}, {room}"

    def as_json(self) -> dict[str, Any]:
        """All that is said of the stage: bytes, seconds and plain numbers."""
        advice = self.advice
        return {
            "parameters": self.count.parameters,
            "gpus": self.gpus,
            "positions": self.count.positions,
            "tokens_per_window": self.count.tokens,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_token": self.flops_per_token,
            "flops_per_step": self.step_flops,
            "flops": self.flops,
            "steps": self.train.steps,
            "global_batch": self.train.global_batch,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "days": self.gpu_seconds / DAY,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "recipe": self.train.zero,
            "choices": {
                choice.name: {**asdict(choice.memory), "total": choice.memory.total, "fits": choice.fits}
                for choice in self.choices
            },
            "recommended": {
                "zero": advice.choice and advice.choice.name,
                "micro_batch": advice.micro_batch,
                "reason": advice.reason,
            },
        }


def plan_stages(recipe: Recipe, cluster: Cluster) -> list[StagePlan]:
    """The three transformers of a recipe on `cluster`.

    Raises UserError where a DeepSpeed file cannot be read, the GPUs do not divide a batch, or lack the precision.
    """
    _check(recipe, cluster)
    fields = token_fields(recipe.encoders, recipe.quantizers)
    dims = {CONDITIONING: recipe.encoders.joint.dim, SEMANTIC: SEMANTIC_DIMS[recipe.encoders.semantic.kind]}
    return [_plan_stage(name, config, fields, dims, cluster) for name, config in recipe.stages]


def training_flops(recipe: Recipe) -> dict[str, int]:
    """FLOPs to train each of the three transformers."""
    fields = token_fields(recipe.encoders, recipe.quantizers)
    dims = {CONDITIONING: recipe.encoders.joint.dim, SEMANTIC: SEMANTIC_DIMS[recipe.encoders.semantic.kind]}
    found = {}
    for name, config in recipe.stages:
        windows = config.train.steps * config.train.global_batch
        found[name] = windows * count_stage(config.model, fields, dims).training_flops
    return found


def _plan_stage(
    name: str, config: StageConfig, fields: dict[str, TokenField], dims: dict[str, int], cluster: Cluster
) -> StagePlan:
    train = config.train
    of_a_rank = train.global_batch // (cluster.gpus or train.ranks)
    most = train.micro_batch if isinstance(train.micro_batch, int) else of_a_rank
    micro_batch = next(micro for micro in divisors(of_a_rank)[::-1] if micro <= most)
    count = count_stage(config.model, fields, dims)
    kept = activation_bytes(config.model, fields, train.recompute)
    plan = StagePlan(name, config, count, cluster, kept, micro_batch)
    if train.micro_batch == "auto":
        *_, smallest = plan.smaller()
        plan = next((smaller for smaller in plan.smaller() if smaller.choice(train.zero).fits), smallest)
    return plan


def _check(recipe: Recipe, cluster: Cluster) -> None:
    stages = {name: config.train for name, config in recipe.stages}
    uneven = [name for name, train in stages.items() if train.global_batch % (cluster.gpus or train.ranks)]
    if uneven:
        train = stages[uneven[0]]
        gpus, numbers = cluster.gpus or train.ranks, ", ".join(map(str, divisors(train.global_batch)))
        raise UserError(
            f"{gpus} GPUs cannot share the {train.global_batch} windows of a step of {uneven[0]} evenly; these numbers "
            f"can: {numbers}.\nOr set {_key(uneven, stages)}.global_batch to a multiple of {gpus}."
        )
    lacking = [name for name, train in stages.items() if cluster.gpu.peak(train.precision) is None]
    if lacking:
        raise UserError(
            f"--gpu {cluster.gpu.name} has no {stages[lacking[0]].precision}: set "
            f"{_key(lacking, stages)}.precision=fp32, or name another."
        )


def _key(names: Sequence[str], stages: Collection[str]) -> str:
    """Where a recipe sets how these of its `stages` are trained."""
    return "stage_defaults.train" if len(names) == len(stages) else f"stages.{names[0]}.train"


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, from 1."""
    small = [part for part in range(1, int(number**0.5) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)})


def plan_json(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """What `stretto plan --json` prints."""
    return {
        "recipe": recipe.name,
        "gpu": asdict(cluster.gpu),
        "mfu": cluster.mfu,
        "shard_bytes_per_second": shard_bytes_a_second(recipe),
        "stages": {plan.name: plan.as_json() for plan in plan_stages(recipe, cluster)},
    }


def shard_bytes_a_second(recipe: Recipe) -> float:
    """Bytes of codes in the token shards for one second of audio; ids and captions come on top."""
    fields, seconds = token_fields(recipe.encoders, recipe.quantizers), recipe.data.clip_seconds
    codes = sum(fields[name].frames(seconds) * fields[name].quantizers for name in (SEMANTIC, ACOUSTIC))
    codes += embedding_rows_a_clip(recipe) * fields[CONDITIONING].quantizers
    return 2 * codes / seconds  # uint16


def embedding_rows_a_clip(recipe: Recipe) -> int:
    """Joint embeddings of one clip: one for each window, a window every hop."""
    joint = recipe.encoders.joint
    return 1 + max(0, int((recipe.data.clip_seconds - joint.window_seconds) / joint.hop_seconds + 1e-9))
