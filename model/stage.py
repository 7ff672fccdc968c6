"""One class for the semantic, coarse and fine transformers: token fields in, token codes out.

Shapes are named by letters: B batch, T frames of the predicted field, Q its predicted quantizers, S decoder steps,
P prefix steps, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ConditionConfig, StageModelConfig
from model.counting import quantizers_used
from model.fields import CONDITIONING, TokenField
from model.patterns import Pattern
from model.transformer import Cache, Transformer

START_ID = 0


def code_offsets(config: StageModelConfig, fields: dict[str, TokenField]) -> dict[tuple[str, int], int]:
    """The id of code 0 of every (field, quantizer) that has embeddings: disjoint ranges, after the start id."""
    embedded = [part for part in config.conditions if set(part.paths) & {"prefix", "aligned"}]
    offsets: dict[tuple[str, int], int] = {}
    end = START_ID + 1
    parts: list[StageModelConfig | ConditionConfig] = [config, *embedded]
    for part in parts:
        for quantizer in quantizers_used(part, fields):
            if (part.field, quantizer) not in offsets:
                offsets[part.field, quantizer] = end
                end += fields[part.field].codebook_size
    return offsets


@lru_cache(maxsize=64)
def aligned_frames(pattern: Pattern, field: TokenField, target: TokenField, device: torch.device) -> Tensor:
    """`[S]`: for each step of `pattern` over `target`, the frame of `field` that sounds at the same moment."""
    frames = [floor(pattern.frame_of(step) * field.rate / target.rate) for step in range(pattern.steps)]
    with torch.inference_mode(False):  # made while sampling, it must still serve training
        return torch.tensor(frames, device=device)


class Condition(nn.Module):
    """One field a stage conditions on, and the paths by which it enters the stream."""

    centroids: Tensor

    def __init__(
        self,
        config: ConditionConfig,
        fields: dict[str, TokenField],
        offsets: dict[tuple[str, int], int],
        null_id: int,
        dim: int,
        centroid_dim: int,
    ) -> None:
        super().__init__()
        self.field = fields[config.field]
        self.paths = config.paths
        self.quantizers = quantizers_used(config, fields)
        self.null_id = null_id
        self.offsets = [offsets.get((config.field, quantizer), 0) for quantizer in self.quantizers]
        if "summed" in config.paths:
            shape = (len(self.quantizers), self.field.codebook_size, centroid_dim)
            # Not in the state: it is the quantizer's, and is kept in one place.
            self.register_buffer("centroids", torch.zeros(shape), persistent=False)
            self.sum_in = nn.Linear(centroid_dim, dim, bias=False)
            self.sum_out = nn.Linear(dim, dim, bias=False)
            self.sum_null = nn.Parameter(torch.zeros(dim))
            nn.init.normal_(self.sum_in.weight, std=centroid_dim**-0.5)
            nn.init.normal_(self.sum_out.weight, std=0.02)

    def load_centroids(self, centroids: Tensor) -> None:
        """Takes the residual codebooks `[quantizers, codebook size, centroid dim]` of the field.

        They are scaled so that a typical sum of centroids has unit variance, which is what the MLP's start expects.
        """
        chosen = centroids[self.quantizers.start : self.quantizers.stop].float()
        self.centroids.copy_(chosen / chosen.pow(2).mean(dim=(1, 2)).sum().sqrt())

    def ids(self, codes: Tensor, dropped_B: Tensor) -> Tensor:
        """Embedding ids `[B, frames, quantizers]`, the null id throughout a dropped window."""
        offsets = torch.tensor(self.offsets, device=codes.device)
        return torch.where(dropped_B[:, None, None], self.null_id, self.select(codes) + offsets)

    def select(self, codes: Tensor) -> Tensor:
        return codes[..., self.quantizers.start : self.quantizers.stop]

    def summed(self, codes: Tensor, dropped_B: Tensor) -> Tensor:
        """The sum of the codes' centroids through a small MLP: `[B, frames, D]`."""
        levels = torch.arange(len(self.quantizers), device=codes.device)
        total = self.centroids[levels, self.select(codes)].sum(dim=2).to(self.sum_in.weight.dtype)
        return torch.where(dropped_B[:, None, None], self.sum_null, self.sum_out(F.silu(self.sum_in(total))))

    def positions(self, frames: int, target: TokenField) -> list[float]:
        """Where this field's prefix steps lie on the target's clock, in target frames.

        A row that describes the whole window lies before it.
        """
        count = len(self.quantizers)
        if self.field.name == CONDITIONING:
            return [quantizer / count - 1 for _ in range(frames) for quantizer in range(count)]
        ratio = float(target.rate / self.field.rate)
        return [(frame + quantizer / count) * ratio for frame in range(frames) for quantizer in range(count)]


class StageTransformer(nn.Module):
    """A decoder that predicts some quantizers of one field, given others.

    Every (field, quantizer, code), the start of the stream and each condition's absence have an embedding row of their
    own. Logits exist for target positions only, each over the codebook of its own quantizer.
    """

    def __init__(
        self, config: StageModelConfig, fields: dict[str, TokenField], centroid_dims: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.fields = fields
        self.target = fields[config.field]
        self.quantizers = quantizers_used(config, fields)
        dim = config.transformer.dim
        offsets = code_offsets(config, fields)
        null_ids = max(offset + fields[name].codebook_size for (name, _), offset in offsets.items())
        self.embedding = nn.Embedding(null_ids + len(config.conditions), dim)
        self.conditions: Sequence[Condition] = nn.ModuleList(  # type: ignore[assignment]
            Condition(part, fields, offsets, null_ids + index, dim, (centroid_dims or {}).get(part.field, 0))
            for index, part in enumerate(config.conditions)
        )
        self.offsets = [offsets[config.field, quantizer] for quantizer in self.quantizers]
        self.transformer = Transformer(config.transformer)
        self.heads = nn.Parameter(torch.empty(len(self.quantizers), self.target.codebook_size, dim))
        # Above the usual 0.02, at which codes are drowned by the conditions added to them: the quickstart's semantic
        # stage learnt in about half the steps (tried once each). At 0.2 it was faster still and followed prompts less.
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.normal_(self.heads, std=0.02)

    def pattern(self, frames: int) -> Pattern:
        return Pattern.of(self.config.pattern, frames, len(self.quantizers))

    def prefix(self, conditions: dict[str, Tensor], dropped_BN: Tensor) -> tuple[Tensor, list[float]]:
        """Embedded prefix steps `[B, P, D]` and their positions."""
        steps = [self.embedding.weight.new_zeros(len(dropped_BN), 0, self.embedding.embedding_dim)]
        positions: list[float] = []
        for index, condition in enumerate(self.conditions):
            if "prefix" in condition.paths:
                ids = condition.ids(conditions[condition.field.name], dropped_BN[:, index])
                steps.append(self.embedding(ids.flatten(1)))
                positions += condition.positions(ids.shape[1], self.target)
        return torch.cat(steps, dim=1), positions

    def added(self, conditions: dict[str, Tensor], dropped_BN: Tensor, pattern: Pattern) -> Tensor:
        """What the aligned and summed conditions add to each step: `[B, S, D]`."""
        total = self.embedding.weight.new_zeros(1, 1, self.embedding.embedding_dim)
        for index, condition in enumerate(self.conditions):
            codes, dropped_B = conditions[condition.field.name], dropped_BN[:, index]
            parts = []
            if "aligned" in condition.paths:
                parts.append(self.embedding(condition.ids(codes, dropped_B)).sum(dim=2))
            if "summed" in condition.paths:
                parts.append(condition.summed(codes, dropped_B))
            for part in parts:
                if condition.field.name != CONDITIONING:
                    part = part[:, aligned_frames(pattern, condition.field, self.target, part.device)]
                total = total + part
        return total.expand(len(dropped_BN), pattern.steps, -1)

    def embed_codes(self, codes_BTQ: Tensor, pattern: Pattern) -> Tensor:
        """What the stream's own codes give each step, the start token and then the codes before it: `[B, S, D]`."""
        batch = len(codes_BTQ)
        steps = self.embedding.weight.new_zeros(batch, pattern.steps + 1, self.embedding.embedding_dim)
        steps[:, 0] = self.embedding.weight[START_ID]
        for quantizer, offset in enumerate(self.offsets):
            steps[:, 1:][:, pattern.steps_of(quantizer)] += self.embedding(codes_BTQ[..., quantizer] + offset)
        return steps[:, :-1]

    def positions(self, prefix_positions: list[float], pattern: Pattern, device: torch.device) -> Tensor:
        """`[P + S]`, in frames of the target (`time`) or in steps of the stream (`index`)."""
        if self.config.positions == "index":
            return torch.arange(len(prefix_positions) + pattern.steps, device=device)
        own = [pattern.time_of(step) for step in range(pattern.steps)]
        return torch.tensor(prefix_positions + own, device=device)

    def hidden(self, codes_BTQ: Tensor, conditions: dict[str, Tensor], dropped_BN: Tensor) -> tuple[Tensor, Pattern]:
        """Hidden states `[B, S, D]` of the target steps, all codes given (the training path)."""
        pattern = self.pattern(codes_BTQ.shape[1])
        prefix, prefix_positions = self.prefix(conditions, dropped_BN)
        own = self.embed_codes(codes_BTQ, pattern) + self.added(conditions, dropped_BN, pattern)
        positions = self.positions(prefix_positions, pattern, own.device)
        hidden = self.transformer(torch.cat([prefix, own], dim=1), positions)
        return hidden[:, prefix.shape[1] :], pattern

    def keep_all(self, batch: int, device: torch.device | None = None) -> Tensor:
        """A `dropped` mask `[B, conditions]` that drops nothing."""
        return torch.zeros(batch, len(self.conditions), dtype=torch.bool, device=device)

    def logits(self, batch: dict[str, Tensor], dropped_BN: Tensor | None = None) -> Tensor:
        """`[B, T, Q, codebook size]` for the codes in `batch`."""
        codes = batch[self.config.field][..., self.quantizers.start : self.quantizers.stop]
        dropped_BN = self.keep_all(len(codes), codes.device) if dropped_BN is None else dropped_BN
        hidden, pattern = self.hidden(codes, batch, dropped_BN)
        rows = [F.linear(hidden[:, pattern.steps_of(q)], head) for q, head in enumerate(self.heads)]
        return torch.stack(rows, dim=2)

    def forward(self, batch: dict[str, Tensor], dropped_BN: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats of each predicted quantizer: `[Q]`, fp32.

        `batch` maps the names of the fields to codes `[B, frames, quantizers]` that start at one moment; `dropped_BN`
        says which conditions (in the order of the recipe) are withheld from which windows.
        """
        codes = batch[self.config.field][..., self.quantizers.start : self.quantizers.stop]
        dropped_BN = self.keep_all(len(codes), codes.device) if dropped_BN is None else dropped_BN
        hidden, pattern = self.hidden(codes, batch, dropped_BN)
        losses = []
        for quantizer, head in enumerate(self.heads):  # one quantizer at a time: no logits tensor of all of them
            logits = F.linear(hidden[:, pattern.steps_of(quantizer)], head)
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), codes[..., quantizer].flatten()))
        return torch.stack(losses)

    def new_cache(self, batch: int, steps: int) -> Cache:
        weight = self.embedding.weight
        return Cache(self.config.transformer, batch, steps, weight.device, weight.dtype)


def build_stage(
    config: StageModelConfig, fields: dict[str, TokenField], quantizers: dict[str, Tensor]
) -> StageTransformer:
    """A stage with fresh weights whose summed conditions hold the centroids of `quantizers`.

    `quantizers` maps a field to its centroids, `[levels, codebook size, dim]`.
    """
    model = StageTransformer(config, fields, {name: value.shape[-1] for name, value in quantizers.items()})
    for condition in model.conditions:
        if "summed" in condition.paths:
            condition.load_centroids(quantizers[condition.field.name])
    return model
