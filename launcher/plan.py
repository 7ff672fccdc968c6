"""`stretto plan`: what a recipe would run where, and what it would cost, by formula. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ds_configs
from launcher.processes import Machine, ranks
from launcher.recipe import Recipe
from launcher.units import duration, short, size
from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig, StageModelConfig
from model.counting import StageCount, activation_bytes, count_stage, quantizers_used, token_fields
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField
from trainer.config import StageConfig, TrainConfig

GPU_PEAK = 989e12
"""FLOP/s of one H100 or H200 in dense bf16."""
MFU = 0.4
"""Share of the peak that training is assumed to reach."""
CPU_RATE = 0.1e12
"""FLOP/s assumed of a CPU rank with one core of a current server, in bf16."""
LARGEST_CPU_TIME = 30 * 86_400
"""Seconds above which nobody would train on CPUs, and the plan does not speak of it."""
GPU_MEMORY = 80e9
"""Bytes of a common large GPU; a stage that needs more is pointed out."""
SEMANTIC_DIMS = {"mel_chroma": 92, "mert": 768}
"""Width of the semantic features by kind, of which the centroids of a summed condition have the same."""
DEFAULT_BUCKET, DEFAULT_LIVE = 5e8, 1e9
"""What DeepSpeed takes, in numbers, where its file names no reduce_bucket_size or stage3_max_live_parameters."""
PRETRAINED = ("encodec", "mert", "clap")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU (or of one CPU rank) while training."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    """DeepSpeed's buffer for gradients on their way between ranks."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class StagePlan:
    """What training one stage costs."""

    name: str
    config: StageConfig
    count: StageCount
    zero: int
    memory: Memory
    checkpoint_bytes: float
    """One checkpoint: weights as trained, fp32 weights and the moments of Adam."""

    @property
    def micro_batch(self) -> int:
        train = self.config.train
        return train.micro_batch or max(1, train.global_batch // train.ranks)

    @property
    def accumulation(self) -> int:
        return self.config.train.global_batch // (self.micro_batch * self.config.train.ranks)

    @property
    def step_flops(self) -> int:
        return self.config.train.global_batch * self.count.training_flops

    @property
    def flops(self) -> int:
        return self.config.train.steps * self.step_flops

    @property
    def windows(self) -> int:
        return self.config.train.steps * self.config.train.global_batch

    def seconds(self, flops_a_rank: float) -> float:
        """Training time at a given speed of one rank; validation and checkpoints come on top."""
        return self.flops / (self.config.train.ranks * flops_a_rank)

    @property
    def disk_bytes(self) -> float:
        """The checkpoints kept, one more while the next is being written, and the final weights in fp32."""
        return (self.config.train.keep_checkpoints + 1) * self.checkpoint_bytes + 4 * self.count.parameters


def stage_memory(parameters: int, activations: float, train: TrainConfig) -> Memory:
    """Bytes of one rank under the ZeRO stage of `train.zero`, Adam's two moments and master weights in fp32.

    ZeRO-1 shares the optimizer's states among the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too, of which
    each rank gathers `stage3_max_live_parameters` at most at a time.
    """
    settings = ds_configs.read(train.zero)["zero_optimization"]
    stage, width = settings["stage"], 2 if train.precision == "bf16" else 4
    share = parameters / train.ranks
    live = min(parameters, settings.get("stage3_max_live_parameters", DEFAULT_LIVE))
    weights = width * (parameters if stage < 3 else share + live)
    gradients = width * (parameters if stage < 2 else share)
    if width == 2:  # turned to fp32 for the optimizer
        gradients += 4 * (share if stage else parameters)
    bucket = settings.get("reduce_bucket_size", DEFAULT_BUCKET) * (2 if settings.get("overlap_comm") else 1)
    states = optimizer_bytes(parameters, train)
    return Memory(
        weights, gradients, states / (train.ranks if stage else 1), width * bucket if stage else 0, activations
    )


def optimizer_bytes(parameters: int, train: TrainConfig) -> int:
    """Both moments and, except in fp32 without ZeRO, a master copy of the weights, of all ranks together."""
    plain = train.precision == "fp32" and ds_configs.zero_stage(train.zero) == 0
    return (8 if plain else 12) * parameters


def plan_stages(recipe: Recipe) -> list[StagePlan]:
    """The three transformers of a recipe. Raises UserError where a DeepSpeed configuration cannot be read."""
    fields = token_fields(recipe.encoders, recipe.quantizers)
    dims = {CONDITIONING: recipe.encoders.joint.dim, SEMANTIC: SEMANTIC_DIMS[recipe.encoders.semantic.kind]}
    plans = []
    for name, config in recipe.stages:
        train = config.train
        count = count_stage(config.model, fields, dims)
        micro = train.micro_batch or max(1, train.global_batch // train.ranks)
        kept = micro * activation_bytes(config.model, fields) * (1 if train.precision == "bf16" else 2)
        memory = stage_memory(count.parameters, kept, train)
        weights = (2 if train.precision == "bf16" else 4) * count.parameters
        checkpoint = weights + optimizer_bytes(count.parameters, train)
        plans.append(StagePlan(name, config, count, ds_configs.zero_stage(train.zero), memory, checkpoint))
    return plans


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


def notes(recipe: Recipe, plans: list[StagePlan]) -> Iterator[str]:
    """What in a plan deserves a second look."""
    for plan in plans:
        if plan.memory.total > GPU_MEMORY:
            yield (
                f"{plan.name} needs {size(plan.memory.total)} a GPU: lower stages.{plan.name}.train.micro_batch, "
                f"or share more with stages.{plan.name}.train.zero=zero3."
            )
    if recipe.data.audio is not None and recipe.encoders.joint.kind == "towers":
        yield "Prompts have a meaning only when the folder of audio has captions; `stretto run` says what it found."


def this_machine(plans: list[StagePlan]) -> str:
    """What there is here, and what it does to the ranks the recipe asks for."""
    machine = Machine.here()
    have = f"This machine: {machine.cores} cores, {len(machine.gpus) or 'no'} GPU{'s' * (len(machine.gpus) != 1)}."
    fewer = [plan for plan in plans if ranks(plan.config.train, len(machine.gpus)) < plan.config.train.ranks]
    changed = (f"{plan.name} on {ranks(plan.config.train, len(machine.gpus))}" for plan in fewer)
    return f"{have} Here the ranks would be fewer: {', '.join(changed)}." if fewer else have


def print_plan(recipe: Recipe, console: Console) -> None:
    """Shows what would run where, what the transformers cost, and what stands on the disk in the end."""
    plans = plan_stages(recipe)
    console.print(f"[bold]{escape(recipe.name)}[/]  {escape(recipe.description)}\n", highlight=False)
    console.print(_stages_table(recipe, plans))
    console.print(_transformers_table(plans))
    console.print(_assumptions(plans), highlight=False, soft_wrap=False)
    console.print(_disk(recipe, plans), highlight=False)
    console.print(this_machine(plans), highlight=False)
    for note in notes(recipe, plans):
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _stages_table(recipe: Recipe, plans: list[StagePlan]) -> Table:
    table = _table("What runs, in order", "stage", "where", "what")
    encoders, quantizers = recipe.encoders, recipe.quantizers
    fields = token_fields(encoders, quantizers)
    here = "this machine"
    table.add_row("corpus", here, _corpus(recipe))
    table.add_row("codec", here, f"{_encoder(encoders.codec)}: {_field(fields[ACOUSTIC])}")
    table.add_row("embedding", here, _encoder(encoders.joint) + f": {encoders.joint.dim} numbers for every window")
    levels = quantizers.conditioning
    fits = f"k-means of the embeddings, {levels.levels} × {levels.codebook_size}, and of the semantic features, "
    table.add_row("quantizers", here, fits + f"{quantizers.semantic.levels} × {quantizers.semantic.codebook_size}")
    table.add_row("tokens", here, f"{_encoder(encoders.semantic)}: {_field(fields[SEMANTIC])}; all fields to shards")
    for plan in plans:
        count = plan.config.train.ranks
        where = f"deepspeed, {count} rank{'s' * (count > 1)}, ZeRO-{plan.zero}"
        table.add_row(plan.name, where, _predicts(plan.config.model, fields))
    table.add_row("bundle", here, "the three stages, quantizers and encoders in one folder")
    prompts = recipe.evaluation
    table.add_row("samples", here, f"{prompts.prompts} prompts × {prompts.seconds:g} s, generated and judged")
    if recipe.parallel > 1:
        table.caption = f"Up to {recipe.parallel} stages run at the same time."
    return table


def _corpus(recipe: Recipe) -> str:
    data = recipe.data
    if data.audio is not None:
        return f"the audio in {escape(data.audio)}, in clips of {data.clip_seconds:g} s"
    return f"{data.clips:,} synthesised clips of {data.clip_seconds:g} s, {duration(data.clips * data.clip_seconds)}"


def _encoder(config: CodecConfig | SemanticEncoderConfig | JointEmbedderConfig) -> str:
    if config.kind in PRETRAINED:
        layer = f", layer {config.layer}" if isinstance(config, SemanticEncoderConfig) else ""
        return f"{config.kind} ({escape(config.weights or 'default weights')}{layer}), {config.sample_rate:,} Hz"
    if isinstance(config, CodecConfig):
        return f"{config.kind}, fitted on {config.fit_clips:,} clips"
    return f"{config.kind}, trained {config.steps:,} steps" if isinstance(config, JointEmbedderConfig) else config.kind


def _field(field: TokenField) -> str:
    return f"{field.quantizers} × {field.codebook_size} codes at {field.rate_hz:g} Hz"


def _predicts(config: StageModelConfig, fields: dict[str, TokenField]) -> str:
    def part(used: Any) -> str:
        chosen, all_of_them = quantizers_used(used, fields), fields[used.field].quantizers
        return used.field if len(chosen) == all_of_them else f"{used.field} {chosen.start + 1}–{chosen.stop}"

    given = ", ".join(f"{part(condition)} ({' + '.join(condition.paths)})" for condition in config.conditions)
    return f"{part(config)} ← {given or 'nothing'}"


def _transformers_table(plans: list[StagePlan]) -> Table:
    table = _table("The three transformers", "", *(plan.name for plan in plans))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, show: Callable[[StagePlan], str], last: bool = False) -> None:
        table.add_row(label, *(show(plan) for plan in plans), end_section=last)

    row("width (dim)", lambda p: str(p.config.model.transformer.dim))
    row("layers × heads", lambda p: f"{p.config.model.transformer.layers} × {p.config.model.transformer.heads}")
    row("parameters", lambda p: short(p.count.parameters))
    row("window", lambda p: f"{p.config.model.window_seconds:g} s")
    row("sequence", lambda p: f"{p.count.positions:,}")
    row("  prefix + steps", lambda p: f"{p.count.prefix:,} + {p.count.steps:,}", last=True)
    row("ranks", lambda p: str(p.config.train.ranks))
    row("windows a step", lambda p: f"{p.config.train.global_batch:,}")
    row("  of a rank", lambda p: f"{p.accumulation} × {p.micro_batch}")
    row("steps", lambda p: f"{p.config.train.steps:,}")
    row("windows seen", lambda p: short(p.windows))
    row("tokens seen", lambda p: short(p.windows * p.count.tokens))
    row("FLOPs a step", lambda p: short(p.step_flops))
    row("FLOPs in all", lambda p: short(p.flops))
    row("time on GPUs (a)", lambda p: duration(p.seconds(MFU * GPU_PEAK)), last=not _on_cpus(plans))
    if _on_cpus(plans):
        row("time on CPUs (b)", lambda p: duration(p.seconds(CPU_RATE)), last=True)
    table.add_row("on each GPU or rank")
    row("  weights", lambda p: size(p.memory.weights))
    row("  gradients", lambda p: size(p.memory.gradients))
    row("  optimizer states", lambda p: size(p.memory.optimizer))
    row("  gradient buffer", lambda p: size(p.memory.buffers))
    row("  activations", lambda p: size(p.memory.activations))
    row("  total", lambda p: size(p.memory.total), last=True)
    row("one checkpoint", lambda p: size(p.checkpoint_bytes))
    row("most on disk (c)", lambda p: size(p.disk_bytes))
    return table


def _on_cpus(plans: list[StagePlan]) -> bool:
    return sum(plan.seconds(CPU_RATE) for plan in plans) < LARGEST_CPU_TIME


def _assumptions(plans: list[StagePlan]) -> str:
    gpu, cpu = (sum(plan.seconds(rate) for plan in plans) for rate in (MFU * GPU_PEAK, CPU_RATE))
    lines = [
        "FLOPs are three forward passes; one is 2 × positions × matrix weights + 2 × layers × width × positions² "
        "(causal attention).",
        f"(a) FLOPs ÷ (ranks × {MFU:.0%} of {GPU_PEAK / 1e12:.0f} TFLOP/s, dense bf16 on an H100 or H200); one stage "
        f"after another: {duration(gpu)}. An assumption, not a measurement.",
        f"(b) FLOPs ÷ (ranks × {CPU_RATE / 1e12:g} TFLOP/s, one core each); in all {duration(cpu)}. An assumption too.",
        "(c) The checkpoints kept, one more while it is written, and the final weights.",
    ]
    return "\n".join(line for line in lines if _on_cpus(plans) or not line.startswith("(b)"))


def _disk(recipe: Recipe, plans: list[StagePlan]) -> str:
    rate = shard_bytes_a_second(recipe)
    shards = f"Token shards: {size(rate * 3_600)} an hour of audio"
    if recipe.data.audio is None:
        seconds = recipe.data.clips * recipe.data.clip_seconds
        audio = size(2 * seconds * recipe.data.sample_rate)
        shards += f", {size(rate * seconds)} for this corpus, whose audio takes {audio} at most"
    return f"{shards}. Checkpoints and weights: {size(sum(plan.disk_bytes for plan in plans))} at most."
