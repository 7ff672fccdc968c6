"""Drawing codes from a stage transformer: a key/value cache, guidance in one batched pass, windows that slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from model.decoder import decoder
from model.errors import UserError
from model.fields import CONDITIONING, TokenField, common_period
from model.prepacked import linear, prepacked
from model.stage import StageTransformer


@dataclass(frozen=True)
class Sampler:
    """How a code is drawn from logits."""

    temperature: float = 1.0
    """0 takes the most likely code."""
    top_k: int | None = None
    top_p: float = 1.0
    """Nucleus: the most likely codes whose probabilities first reach this sum (Holtzman et al. 2020)."""
    cfg: float = 1.0
    """Guidance scale g: logits are u + g (c - u), of the unconditioned u and the conditioned c (Ho & Salimans 2022)."""

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Codes `[B]` from `logits [B, C]` by inverting the cumulative distribution at `uniform [B]`.

        One number a code keeps a sample's draws apart from those of the samples it shares a batch with.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p  # the sum was reached before this code
            probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), 0.0)
        cumulative = probabilities.cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
        return drawn.clamp_max(logits.shape[-1] - 1)


@torch.inference_mode()
def generate_window(
    stage: StageTransformer,
    conditions: dict[str, Tensor],
    frames: int,
    sampler: Sampler,
    uniform: Tensor,
    known: Tensor | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    dropped: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Codes `[B, frames, Q]` of one window.

    `conditions` maps fields to codes that start where the window starts; `uniform [B, frames, Q]` holds the random
    numbers; the first frames may be `known [B, K, Q]` and are then kept; `dropped [B, N]` (bool) names the conditions,
    in the recipe's order, that a row does without, though it has codes for them. To `scores` `[B]` is added what
    `log_probability` gives for each code that is drawn. Raises UserError where the conditions do not fit the stage or
    logits are not finite.
    """
    batch = len(uniform)
    stage.check(conditions, frames)
    pattern = stage.pattern(frames)
    guided = sampler.cfg != 1.0 and len(stage.conditions) > 0
    dropped = stage.keep_all(batch, uniform.device) if dropped is None else dropped
    if guided:  # the unconditioned pass rides in the same batch
        conditions = {name: codes.repeat(2, 1, 1) for name, codes in conditions.items()}
        dropped = torch.cat([dropped, torch.ones_like(dropped)])
    prefix = stage.embed_prefix(conditions, dropped)
    added = stage.added(conditions, dropped, pattern)

    codes = torch.zeros(batch, frames, len(stage.quantizers), dtype=torch.long, device=uniform.device)
    first_free = 0
    if known is not None:
        first_free = known.shape[1]
        codes[:, :first_free] = known
    # Steps before the first one that predicts a free code take in known codes only, so they run in one pass.
    start = min(first_free * pattern.stride, pattern.steps - 1)
    ready = stage.embed_codes(codes, pattern)[:, : start + 1]
    step_in = torch.cat([prefix, (ready.repeat(2, 1, 1) if guided else ready) + added[:, : start + 1]], dim=1)
    cache = stage.new_cache(len(dropped), prefix.shape[1] + pattern.steps)
    steps = decoder(stage.transformer, stage.rotary(conditions, pattern), cache)
    heads = [linear(head) for head in stage.heads]
    first_bad = torch.full((), pattern.steps, device=uniform.device)
    for step in range(start, pattern.steps):
        hidden = steps.feed(step_in)
        embedded = stage.embedding.weight.new_zeros(batch, stage.embedding.embedding_dim)
        for frame, quantizer in pattern.codes_at(step):
            if frame >= first_free:
                logits = conditioned = heads[quantizer](hidden).float()
                if guided:
                    conditioned, free = logits.chunk(2)
                    logits = free + sampler.cfg * (conditioned - free)
                # Looked at once, at the end: a GPU would wait at every look.
                first_bad = torch.where(logits.isfinite().all(), first_bad, first_bad.clamp_max(step))
                codes[:, frame, quantizer] = sampler.draw(logits, uniform[:, frame, quantizer])
                if scores is not None:
                    scores += log_probability(conditioned, codes[:, frame, quantizer])
            embedded = embedded + stage.embedding(codes[:, frame, quantizer] + stage.offsets[quantizer])
        if step + 1 < pattern.steps:
            step_in = (embedded.repeat(2, 1) if guided else embedded)[:, None] + added[:, step + 1 : step + 2]
        on_step(step + 1, pattern.steps)
    if first_bad < pattern.steps:
        raise UserError(
            f"logits of field {stage.target.name!r} are not finite from step {int(first_bad)} of {pattern.steps} on: "
            "the weights are damaged or their training diverged. Export an earlier checkpoint, or train again."
        )
    return codes


def log_probability(logits: Tensor, codes: Tensor) -> Tensor:
    """Of `codes` `[B]` under the conditioned `logits` `[B, C]`, in nats: `[B]`.

    The stage's own distribution, before guidance, temperature, top-k and top-p: it says how likely the stage takes what
    was drawn, and means the same however that was drawn.
    """
    return logits.log_softmax(dim=-1).gather(-1, codes[:, None])[:, 0]


def window_starts(total: Fraction, window: Fraction, overlap: Fraction, grid: Fraction) -> list[Fraction]:
    """Where windows start, in seconds, to cover `total`, each overlapping the one before by `overlap` or more.

    All lie on `grid`, where every field starts a frame, so that no field slips against another.
    """
    hop = max(grid, (window - overlap) // grid * grid)
    starts = [Fraction(0)]
    while starts[-1] + window < total:
        starts.append(starts[-1] + hop)
    return starts


def generate_stage(
    stage: StageTransformer,
    conditions: dict[str, Tensor],
    seconds: float,
    sampler: Sampler,
    seeds: list[int],
    overlap: float = 0.5,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    dropped: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Codes `[B, frames, Q]` for `seconds`, window after window; `overlap` is a share of the window.

    `conditions` hold whole-length codes, except the conditioning row `[B, 1, Q]`, which every window sees; of those
    that `dropped [B, N]` names for a row, it sees none. To `scores` `[B]` is added the `log_probability` of every code,
    each by the window that drew it. The same seed gives the same codes whatever else is in the batch.
    """
    stage = prepacked(stage)
    target = stage.target
    used: list[TokenField] = [target, *(c.field for c in stage.conditions if c.field.name != CONDITIONING)]
    grid = common_period(used)
    window = Fraction(stage.config.window_seconds).limit_denominator(1_000_000)
    total = Fraction(target.frames(seconds)) / target.rate
    starts = window_starts(total, window, window * Fraction(overlap).limit_denominator(100), grid)
    device = stage.embedding.weight.device
    uniform = draw_uniform(seeds, (target.frames(float(total)), len(stage.quantizers)), device)
    codes = torch.zeros(uniform.shape, dtype=torch.long, device=device)
    done = 0
    for number, start in enumerate(starts):
        end_time = min(start + window, total)
        first, end = int(start * target.rate), int(end_time * target.rate)
        cut = {
            c.field.name: codes_between(conditions[c.field.name], c.field, start, end_time)
            for c in stage.conditions
            if c.field.name in conditions
        }
        known = codes[:, first:done] if done > first else None

        def report(step: int, steps: int, number: int = number) -> None:
            on_step(number * steps + step, len(starts) * steps)

        codes[:, first:end] = generate_window(
            stage, cut, end - first, sampler, uniform[:, first:end], known, report, dropped, scores
        )
        done = end
    return codes


def codes_between(codes: Tensor, field: TokenField, start: Fraction, end: Fraction) -> Tensor:
    """The frames of `codes [B, frames, Q]` that sound in `[start, end)`; the conditioning describes all of it."""
    if field.name == CONDITIONING:
        return codes
    return codes[:, int(start * field.rate) : ceil(end * field.rate)]


def draw_uniform(seeds: list[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`[len(seeds), *shape]` numbers in [0, 1), each row from a generator of its own."""
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device)
