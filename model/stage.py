"""One class for the semantic, coarse and fine transformers: token fields in, token codes out.

Shapes are named by letters: B batch, T frames of the predicted field, Q its predicted quantizers, S decoder steps,
P prefix steps, D model width, N conditions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Packing
from model.cache import LayerCache, new_cache
from model.checks import check_quantizers, check_window
from model.conditions import Condition, aligned_frames
from model.config import ConditionConfig, ExecutionConfig, StageModelConfig
from model.counting import quantizers_used
from model.dropping import Dropped
from model.fields import CONDITIONING, TokenField
from model.initialisation import initialise
from model.loss import linear_cross_entropy, losses_and_accuracies
from model.patterns import Pattern
from model.transformer import Rotary, Transformer, rotary_tables

START_ID = 0

Batch = dict[str, Tensor]
"""Codes `[B, frames, quantizers]` of each field, by name, that start at one moment."""


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


class StageTransformer(nn.Module):
    """A decoder that predicts some quantizers of one field, given others.

    Every (field, quantizer, code), the start of the stream and each condition's absence have an embedding row of their
    own. Logits exist for target positions only, each over the codebook of its own quantizer. Raises UserError for
    quantizers that a field does not have, and for batches that do not fit.
    """

    offsets_Q: Tensor

    def __init__(
        self, config: StageModelConfig, fields: dict[str, TokenField], centroid_dims: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        check_quantizers(config, fields)
        self.config = config
        self.fields = fields
        self.target = fields[config.field]
        self.quantizers = quantizers_used(config, fields)
        dim = config.transformer.dim
        offsets = code_offsets(config, fields)
        null_ids = max(offset + fields[name].codebook_size for (name, _), offset in offsets.items())
        self.mask_id = null_ids + len(config.conditions)
        self.embedding = nn.Embedding(self.mask_id + (config.forgetful_masking > 0), dim)
        self.conditions: Sequence[Condition] = nn.ModuleList(  # type: ignore[assignment]
            Condition(part, fields, offsets, null_ids + index, dim, (centroid_dims or {}).get(part.field, 0))
            for index, part in enumerate(config.conditions)
        )
        self.offsets = [offsets[config.field, quantizer] for quantizer in self.quantizers]
        self.register_buffer("offsets_Q", torch.tensor(self.offsets), persistent=False)
        self.transformer = Transformer(config.transformer)
        self.heads = nn.Parameter(torch.empty(len(self.quantizers), self.target.codebook_size, dim))
        initialise(self, config.transformer)

    def configure(self, execution: ExecutionConfig) -> None:
        """Sets how the stage is computed: attention backend, compilation, recomputation. Call it once the weights have
        their type and are on their device. Raises UserError where that is not possible here."""
        self.transformer.configure(execution)

    def pattern(self, frames: int) -> Pattern:
        return Pattern.of(self.config.pattern, frames, len(self.quantizers))

    def check(self, conditions: Batch, frames: int) -> None:
        """Raises UserError unless `conditions` and a window of `frames` frames fit the stage."""
        check_window(self.config, self.fields, conditions, frames)

    def embed_prefix(self, conditions: Batch, dropped_BN: Tensor) -> Tensor:
        """Embedded prefix steps `[B, P, D]`."""
        steps = [self.embedding.weight.new_zeros(len(dropped_BN), 0, self.embedding.embedding_dim)]
        for index, condition in enumerate(self.conditions):
            if "prefix" in condition.paths:
                ids = condition.ids(conditions[condition.field.name], dropped_BN[:, index])
                steps.append(self.embedding(ids.flatten(1)))
        return torch.cat(steps, dim=1)

    def added(self, conditions: Batch, dropped_BN: Tensor, pattern: Pattern) -> Tensor:
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

    def embed_codes(self, codes_BTQ: Tensor, pattern: Pattern, forgotten_BTQ: Tensor | None = None) -> Tensor:
        """What the stream's own codes give each step, the start token and then the codes before it: `[B, S, D]`."""
        ids = codes_BTQ + self.offsets_Q
        if forgotten_BTQ is not None:
            ids = torch.where(forgotten_BTQ, self.mask_id, ids)
        steps = self.embedding.weight.new_zeros(len(ids), pattern.steps + 1, self.embedding.embedding_dim)
        steps[:, 0] = self.embedding.weight[START_ID]
        for quantizer in range(len(self.quantizers)):
            steps[:, 1:][:, pattern.steps_of(quantizer)] += self.embedding(ids[..., quantizer])
        return steps[:, :-1]

    def positions(self, conditions: Batch, pattern: Pattern) -> tuple[float, ...]:
        """Where prefix and steps lie, in frames of the target (`time`) or in steps (`index`)."""
        prefix = [
            position
            for condition in self.conditions
            if "prefix" in condition.paths
            for position in condition.positions(conditions[condition.field.name].shape[1], self.target)
        ]
        positions = [*prefix, *(pattern.time_of(step) for step in range(pattern.steps))]
        if self.config.positions == "index":
            positions = list(map(float, range(len(positions))))
        return tuple(positions)

    def rotary(self, conditions: Batch, pattern: Pattern) -> Rotary:
        """Tables for the positions of prefix and steps."""
        transformer, weight = self.config.transformer, self.embedding.weight
        head_dim = transformer.dim // transformer.heads
        positions = self.positions(conditions, pattern)
        return rotary_tables(positions, head_dim, transformer.rope_theta, weight.device, weight.dtype)

    def keep_all(self, batch: int, device: torch.device | None = None) -> Tensor:
        """Dropped conditions `[B, N]`: none."""
        return torch.zeros(batch, len(self.conditions), dtype=torch.bool, device=device)

    def own_codes(self, batch: Batch) -> Tensor:
        """The codes `[B, T, Q]` that are predicted."""
        return batch[self.config.field][..., self.quantizers.start : self.quantizers.stop]

    def embed(self, batch: Batch, dropped: Dropped | None) -> tuple[Tensor, Rotary, Pattern]:
        """Embedded prefix and steps `[B, P + S, D]`, all codes given (the training path)."""
        codes = self.own_codes(batch)
        self.check(batch, codes.shape[1])
        dropped = dropped or Dropped(self.keep_all(len(codes), codes.device))
        pattern = self.pattern(codes.shape[1])
        own = self.embed_codes(codes, pattern, dropped.codes_BTQ)
        own = own + self.added(batch, dropped.conditions_BN, pattern)
        prefix = self.embed_prefix(batch, dropped.conditions_BN)
        return torch.cat([prefix, own], dim=1), self.rotary(batch, pattern), pattern

    def logits(self, batch: Batch, dropped: Dropped | None = None) -> Tensor:
        """`[B, T, Q, codebook size]` for the codes in `batch`."""
        embedded, rotary, pattern = self.embed(batch, dropped)
        hidden = self.transformer(embedded, rotary)[:, -pattern.steps :]
        return torch.stack([F.linear(hidden[:, pattern.steps_of(q)], head) for q, head in enumerate(self.heads)], dim=2)

    def forward(
        self, batch: Batch | list[Batch], dropped: Dropped | list[Dropped] | None = None, accuracy: bool = False
    ) -> Tensor:
        """Mean cross-entropy in nats of each predicted quantizer: `[Q]`, fp32. Windows in a list are packed.

        With `accuracy` also the share of codes that were the likeliest one, `[2, Q]` together, without a gradient.
        """
        if isinstance(batch, list):
            assert not isinstance(dropped, Dropped)
            return self.packed(batch, dropped, accuracy)
        assert not isinstance(dropped, list)
        embedded, rotary, pattern = self.embed(batch, dropped)
        hidden = self.transformer(embedded, rotary)
        rows = predicting_rows(len(hidden), hidden.shape[1], pattern, hidden.device)
        targets = self.own_codes(batch).permute(2, 0, 1).flatten(1)
        judge = losses_and_accuracies if accuracy else linear_cross_entropy
        return judge(hidden.flatten(0, 1), self.heads, rows, targets)

    def packed(
        self, windows: Sequence[Batch], dropped: Sequence[Dropped] | None = None, accuracy: bool = False
    ) -> Tensor:
        """The same for windows (batches of one) of any lengths, in one row without padding: the mean over all codes."""
        embedded, rotaries, rows, targets = [], [], [], []
        lengths: list[int] = []
        for number, window in enumerate(windows):
            steps, rotary, pattern = self.embed(window, dropped[number] if dropped else None)
            rows.append(sum(lengths) + predicting_rows(1, steps.shape[1], pattern, steps.device))
            targets.append(self.own_codes(window)[0].t())
            embedded.append(steps)
            rotaries.append(rotary)
            lengths.append(steps.shape[1])
        cos, sin = (torch.cat(tables) for tables in zip(*rotaries, strict=True))
        hidden = self.transformer(torch.cat(embedded, dim=1), (cos, sin), packing=Packing(tuple(lengths)))
        judge = losses_and_accuracies if accuracy else linear_cross_entropy
        return judge(hidden[0], self.heads, torch.cat(rows, dim=1), torch.cat(targets, dim=1))

    def new_cache(self, batch: int, steps: int) -> list[LayerCache]:
        weight = self.embedding.weight
        return new_cache(self.config.transformer, batch, steps, weight.device, weight.dtype)


def predicting_rows(batch: int, length: int, pattern: Pattern, device: torch.device) -> Tensor:
    """Which of the `batch × length` hidden states, whose last steps are the pattern's, predict the codes of each
    quantizer: `[Q, B × T]`."""
    starts = torch.arange(batch, device=device)[:, None] * length + length - pattern.steps
    steps = torch.arange(pattern.steps, device=device)
    return torch.stack([(starts + steps[pattern.steps_of(q)]).flatten() for q in range(pattern.quantizers)])


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
