"""`stretto plan` for people: what would run where, what it costs, and which ZeRO choice to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.plan import Advice, Choice, Cluster, StagePlan, plan_stages, shard_bytes_a_second
from launcher.processes import Machine, ranks
from launcher.recipe import Recipe
from launcher.units import counted, duration, short, size
from model.config import CodecConfig, JointEmbedderConfig, SemanticEncoderConfig, StageModelConfig
from model.counting import quantizers_used, token_fields
from model.fields import ACOUSTIC, SEMANTIC, TokenField

CPU_RATE = 0.1e12
"""FLOP/s assumed of a CPU rank with one core of a current server, in bf16."""
LARGEST_CPU_TIME = 30 * 86_400
"""Seconds above which nobody would train on CPUs, and the plan does not speak of it."""
PRETRAINED = ("encodec", "mert", "hubert", "clap")


def print_plan(recipe: Recipe, cluster: Cluster, console: Console) -> None:
    """Shows what would run where, what the transformers cost, which ZeRO choice fits, and what stands on the disk."""
    plans = plan_stages(recipe, cluster)
    console.print(f"[bold]{escape(recipe.name)}[/]  {escape(recipe.description)}\n", highlight=False)
    console.print(_stages_table(recipe, plans))
    console.print(_transformers_table(plans))
    console.print(_assumptions(plans), highlight=False)
    for plan in plans:
        advice = plan.advice
        console.print(_choices_table(plan, advice))
        for line in _advice(plan, advice):
            console.print(escape(line), highlight=False)
        console.print()
    console.print(_disk(recipe, plans), highlight=False)
    console.print(this_machine(plans), highlight=False)
    if recipe.data.audio is not None and recipe.encoders.joint.kind == "towers":
        note = "prompts have a meaning only when the folder of audio has captions; `stretto run` says what it found."
        console.print(f"[yellow]Note:[/] {note}", highlight=False)


def this_machine(plans: list[StagePlan]) -> str:
    """What there is here, and what it does to the ranks the recipe asks for."""
    machine = Machine.here()
    have = f"This machine: {machine.cores} cores, {len(machine.gpus) or 'no'} GPU{'s' * (len(machine.gpus) != 1)}."
    fewer = [plan for plan in plans if ranks(plan.train, len(machine.gpus)) < plan.train.ranks]
    changed = (f"{plan.name} on {ranks(plan.train, len(machine.gpus))}" for plan in fewer)
    return f"{have} Here the ranks would be fewer: {', '.join(changed)}." if fewer else have


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
        table.add_row(plan.name, f"deepspeed, {counted(plan.gpus, 'rank')}", _predicts(plan.config.model, fields))
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
    row("GPUs or ranks", lambda p: f"{p.gpus:,}")
    row("windows a step", lambda p: f"{p.train.global_batch:,}")
    row("  of a rank", lambda p: f"{p.accumulation} × {p.micro_batch}")
    row("tokens a step", lambda p: short(p.tokens_per_step))
    row("steps", lambda p: f"{p.train.steps:,}")
    row("windows seen", lambda p: short(p.windows))
    row("tokens seen", lambda p: short(p.windows * p.count.tokens), last=True)
    row("FLOPs a token", lambda p: short(p.flops_per_token))
    row("FLOPs a step", lambda p: short(p.step_flops))
    row("FLOPs in all", lambda p: short(p.flops))
    row("time on GPUs (a)", lambda p: duration(p.gpu_seconds), last=not _on_cpus(plans))
    if _on_cpus(plans):
        row("time on CPUs (b)", lambda p: duration(p.seconds(CPU_RATE)), last=True)
    row("one checkpoint", lambda p: size(p.checkpoint_bytes))
    row("most on disk (c)", lambda p: size(p.disk_bytes))
    return table


def _on_cpus(plans: list[StagePlan]) -> bool:
    return sum(plan.seconds(CPU_RATE) for plan in plans) < LARGEST_CPU_TIME


def _assumptions(plans: list[StagePlan]) -> str:
    cluster = plans[0].cluster
    gpu, cpu = sum(plan.gpu_seconds for plan in plans), sum(plan.seconds(CPU_RATE) for plan in plans)
    precisions = dict.fromkeys(plan.train.precision for plan in plans)
    peaks = " and ".join(f"{(cluster.gpu.peak(name) or 0) / 1e12:g} TFLOP/s, dense {name}" for name in precisions)
    lines = [
        "FLOPs are three forward passes; one is 2 × positions × matrix weights + 2 × layers × width × positions² "
        "(causal attention).",
        f"(a) FLOPs ÷ (GPUs × {cluster.mfu:.0%} of the peak of one {cluster.gpu.name}, {peaks}); one stage after "
        f"another: {duration(gpu)}. An assumption (--mfu, --gpu, --gpus), not a measurement.",
        f"(b) FLOPs ÷ (ranks × {CPU_RATE / 1e12:g} TFLOP/s, one core each); in all {duration(cpu)}. An assumption too.",
        "(c) The checkpoints kept, one more while it is written, and the final weights.\n",
    ]
    return "\n".join(line for line in lines if _on_cpus(plans) or not line.startswith("(b)"))


def _choices_table(plan: StagePlan, advice: Advice) -> Table:
    """Bytes on each GPU under every ZeRO choice, at the micro batch that is advised; an arrow is before the choice."""
    where = f"each of {plan.gpus:,} GPUs" if plan.gpus > 1 else "the GPU"
    title = f"{plan.name} on {where}, {counted(advice.micro_batch, 'window')} at a time"
    if advice.micro_batch != plan.micro_batch:
        title += f" ({plan.micro_batch} do not fit)"
    columns = ("weights", "gradients", "optimizer", "buffers", "activations", "total", "fits")
    table = _table(title, "", *columns)
    table.padding = (0, 0)
    for column in table.columns[1:]:
        column.justify = "right"
    for choice in replace(plan, micro_batch=advice.micro_batch).choices:
        memory = choice.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.buffers, memory.activations, memory.total)
        chosen = choice == advice.choice
        name = ("→ " if chosen else "  ") + _short_name(choice)
        shown = (size(part) if part else "–" for part in parts)
        table.add_row(name, *shown, "yes" if choice.fits else "no", style="bold" if chosen else None)
    return table


def _short_name(choice: Choice) -> str:
    return escape(Path(choice.name).name)


def _advice(plan: StagePlan, advice: Advice) -> Iterator[str]:
    """What to take and why, what to change in the recipe for it, and what lies outside the GPUs."""
    if advice.choice is None:
        yield f"{plan.name}: {advice.reason}. More GPUs, train.recompute=block or a smaller transformer would help."
        return
    yield f"→ {advice.choice.name}: {advice.reason}."
    train = plan.train
    given = train.global_batch // plan.gpus if train.micro_batch is None else train.micro_batch
    if given == "auto":
        given = advice.micro_batch  # the trainer finds it
    wanted = {
        "ranks": (plan.gpus, train.ranks),
        "zero": (advice.choice.name, train.zero),
        "micro_batch": (advice.micro_batch, given),
    }
    changes = [f"stages.{plan.name}.train.{key}={new}" for key, (new, old) in wanted.items() if new != old]
    if changes:
        yield f"  {' '.join(changes)}"
    yield f"  Outside the GPU a rank takes {', '.join(map(_outside, filter(_is_outside, plan.choices)))}."


def _is_outside(choice: Choice) -> bool:
    return bool(choice.memory.host)


def _outside(choice: Choice) -> str:
    nvme = f" and {size(choice.memory.nvme)} of NVMe" if choice.memory.nvme else ""
    return f"{size(choice.memory.host)} of memory{nvme} under {_short_name(choice)}"


def _disk(recipe: Recipe, plans: list[StagePlan]) -> str:
    rate = shard_bytes_a_second(recipe)
    shards = f"Token shards: {size(rate * 3_600)} an hour of audio"
    if recipe.data.audio is None:
        seconds = recipe.data.clips * recipe.data.clip_seconds
        audio = size(2 * seconds * recipe.data.sample_rate)
        shards += f", {size(rate * seconds)} for this corpus, whose audio takes {audio} at most"
    return f"{shards}. Checkpoints and weights: {size(sum(plan.disk_bytes for plan in plans))} at most."
