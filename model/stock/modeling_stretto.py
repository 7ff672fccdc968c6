"""A stage exported by Stretto that no stock model computes, for `transformers` with `trust_remote_code=True`.

The blocks are those of a stock Llama or Qwen3. What a stock model cannot express is here: several codes taken in and
predicted at one step (the pattern `delay`), conditions added to each step, and positions that are moments and not
numbers of tokens. This file needs torch and transformers alone; the block `stretto` of `config.json` tells it the rest.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    codes = model.generate({"conditioning": ...}, frames=125)          # [batch, frames, quantizers]
    loss = model(codes, {"conditioning": ...}).loss                    # for fine-tuning

Shapes are named by letters: B batch, T frames of the predicted field, Q its predicted quantizers, C its codebook size,
S decoder steps, P prefix steps, D model width, N conditions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

Codes = dict[str, Tensor]
"""Codes `[B, frames, quantizers of the field]` of each field, by name, that start at one moment."""


class StrettoConfig(PretrainedConfig):
    """`text_config` (so named that tools find it) is the Llama or Qwen3 inside; `stretto` says what the ids mean."""

    model_type = "stretto_stage"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # type: ignore[misc]

    def __init__(
        self, text_config: dict[str, Any] | None = None, stretto: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.text_config = AutoConfig.for_model(**(text_config or {"model_type": "llama"}))
        self.stretto = stretto or {}
        super().__init__(**kwargs)


class Rotary(nn.Module):
    """Rotary position tables for real-valued positions, in place of the stock model's; angles are taken in fp64."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device) / self.head_dim
        angles = position_ids.double()[..., None] * self.theta**-powers
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Condition(nn.Module):
    """The weights of one condition; only one that is `summed` has any: its codes' centroids go through a small MLP."""

    centroids: Tensor

    def __init__(self, part: dict[str, Any], dim: int) -> None:
        super().__init__()
        if "summed" in part["paths"]:
            shape = (part["quantizers"], part["codebook_size"], part["centroid_dim"])
            self.register_buffer("centroids", torch.zeros(shape))
            self.sum_in = nn.Linear(part["centroid_dim"], dim, bias=False)
            self.sum_out = nn.Linear(dim, dim, bias=False)
            self.sum_null = nn.Parameter(torch.zeros(dim))

    def forward(self, codes: Tensor, dropped_B: Tensor) -> Tensor:
        levels = torch.arange(codes.shape[-1], device=codes.device)
        total = self.centroids[levels, codes].sum(dim=2).to(self.sum_in.weight.dtype)
        return torch.where(dropped_B[:, None, None], self.sum_null, self.sum_out(F.silu(self.sum_in(total))))


class StrettoStage(PreTrainedModel, GenerationMixin):
    generation_config: GenerationConfig
    config_class = StrettoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StrettoConfig) -> None:
        super().__init__(config)
        inside, layout = config.text_config, config.stretto
        self.layout = layout
        self.parts: list[dict[str, Any]] = layout["conditions"]
        self.stride: int = layout["stride"]
        self.first_ids: list[int] = layout["predicts"]["first_ids"]
        self.quantizers = len(self.first_ids)
        self.model = AutoModel.from_config(inside)
        rope = getattr(inside, "rope_parameters", None)  # of transformers 5
        self.model.rotary_emb = Rotary(inside.head_dim, rope["rope_theta"] if rope else inside.rope_theta)
        self.conditions = nn.ModuleList(Condition(part, inside.hidden_size) for part in self.parts)
        codebook_size = layout["predicts"]["codebook_size"]
        self.heads = nn.Parameter(torch.empty(self.quantizers, codebook_size, inside.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # By way of nn.init, which transformers 5 keeps from what was loaded already.
            nn.init.normal_(self.heads, std=self.config.text_config.initializer_range)

    # The pattern: the code of frame t and quantizer q lies at step t × stride + q.

    def steps(self, frames: int) -> int:
        return (frames - 1) * self.stride + self.quantizers

    def steps_of(self, quantizer: int, frames: int) -> slice:
        return slice(quantizer, quantizer + (frames - 1) * self.stride + 1, self.stride)

    def codes_at(self, step: int, frames: int) -> Iterator[tuple[int, int]]:
        for quantizer in range(self.quantizers):
            frame, remainder = divmod(step - quantizer, self.stride)
            if remainder == 0 and 0 <= frame < frames:
                yield frame, quantizer

    # What the blocks take in.

    def select(self, part: dict[str, Any], conditions: Codes) -> Tensor:
        first = part["first_quantizer"]
        return conditions[part["field"]][..., first : first + part["quantizers"]]

    def embed(self, part: dict[str, Any], codes: Tensor, dropped_B: Tensor) -> Tensor:
        """`[B, frames, quantizers, D]`: each code's embedding, or the learnt absence throughout a dropped window."""
        ids = codes + torch.tensor(part["first_ids"], device=codes.device)
        return self.model.embed_tokens(torch.where(dropped_B[:, None, None], part["null_id"], ids))

    def embed_prefix(self, conditions: Codes, dropped_BN: Tensor) -> Tensor:
        """`[B, P, D]`"""
        steps = [self.heads.new_zeros(len(dropped_BN), 0, self.heads.shape[-1])]
        for number, part in enumerate(self.parts):
            if "prefix" in part["paths"]:
                steps.append(self.embed(part, self.select(part, conditions), dropped_BN[:, number]).flatten(1, 2))
        return torch.cat(steps, dim=1)

    def added(self, conditions: Codes, dropped_BN: Tensor, frames: int) -> Tensor:
        """What the conditions add to each step: `[B, S, D]`."""
        total = self.heads.new_zeros(1, 1, self.heads.shape[-1])
        for number, part in enumerate(self.parts):
            codes, dropped_B = self.select(part, conditions), dropped_BN[:, number]
            values = []
            if "aligned" in part["paths"]:
                values.append(self.embed(part, codes, dropped_B).sum(dim=2))
            if "summed" in part["paths"]:
                values.append(self.conditions[number](codes, dropped_B))
            for value in values:
                total = total + (value if part["whole_window"] else value[:, self.frames_of(part, frames)])
        return total.expand(len(dropped_BN), self.steps(frames), -1)

    def frames_of(self, part: dict[str, Any], frames: int) -> list[int]:
        """For each step, the frame of the condition that sounds at the same moment."""
        over, under = part["frames_per_target_frame"]
        return [min(step // self.stride, frames - 1) * over // under for step in range(self.steps(frames))]

    def embed_codes(self, codes_BTQ: Tensor) -> Tensor:
        """What the codes before each step give it, the start first: `[B, S, D]`."""
        frames = codes_BTQ.shape[1]
        ids = codes_BTQ + torch.tensor(self.first_ids, device=codes_BTQ.device)
        steps = self.heads.new_zeros(len(ids), self.steps(frames) + 1, self.heads.shape[-1])
        steps[:, 0] = self.model.embed_tokens.weight[self.layout["start_id"]]
        for quantizer in range(self.quantizers):
            steps[:, 1:][:, self.steps_of(quantizer, frames)] += self.model.embed_tokens(ids[..., quantizer])
        return steps[:, :-1]

    def positions(self, conditions: Codes, frames: int) -> Tensor:
        """`[1, P + S]`, in frames of what is predicted; a row that describes the whole window lies before it."""
        places: list[float] = []
        for part in self.parts:
            if "prefix" in part["paths"]:
                count, found = part["quantizers"], conditions[part["field"]].shape[1]
                over, under = part["frames_per_target_frame"]
                first, ratio = (-1, 1.0) if part["whole_window"] else (0, under / over)
                repeats = [0] * found if part["whole_window"] else range(found)
                places += [first + (frame + q / count) * ratio for frame in repeats for q in range(count)]
        places += [step / self.stride for step in range(self.steps(frames))]
        if self.layout["positions"] == "index":
            places = list(map(float, range(len(places))))
        return torch.tensor(places, dtype=torch.float64, device=self.heads.device)[None]

    def run(self, embedded: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states of steps that follow those in `cache`."""
        done = cache.get_seq_length() if cache is not None else 0
        # A mask says that this is one window: without it, positions that are not whole look like windows packed.
        mask = torch.ones(len(embedded), done + embedded.shape[1], dtype=torch.long, device=embedded.device)
        return self.model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions[:, done : mask.shape[1]],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def keep_all(self, rows: int) -> Tensor:
        return torch.zeros(rows, len(self.parts), dtype=torch.bool, device=self.heads.device)

    def forward(self, codes: Tensor, conditions: Codes | None = None, dropped: Tensor | None = None) -> CausalLMOutput:
        """`logits [B, T, Q, C]` for `codes [B, T, Q]`, each given those before it, and their mean cross-entropy.

        Conditions in `dropped [B, N]` (bool, in the order of the configuration) are replaced by their learnt absence.
        """
        conditions, frames = conditions or {}, codes.shape[1]
        dropped = self.keep_all(len(codes)) if dropped is None else dropped
        steps = self.embed_codes(codes) + self.added(conditions, dropped, frames)
        embedded = torch.cat([self.embed_prefix(conditions, dropped), steps], dim=1)
        hidden = self.run(embedded, self.positions(conditions, frames))[:, -steps.shape[1] :]
        logits = [F.linear(hidden[:, self.steps_of(q, frames)], head) for q, head in enumerate(self.heads)]
        stacked = torch.stack(logits, dim=2)
        loss = F.cross_entropy(stacked.float().flatten(0, 2), codes.flatten())
        return CausalLMOutput(loss=loss, logits=stacked)  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        conditions: Codes | None = None,
        frames: int | None = None,
        known: Tensor | None = None,
        dropped: Tensor | None = None,
        batch: int = 1,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Tensor:
        """Codes `[B, frames, Q]` of one window, a whole one when `frames` is not given.

        The first frames may be `known [B, T, Q]`. `do_sample`, `temperature`, `top_k`, `top_p` and `guidance_scale`
        mean what they do elsewhere in transformers. `batch` counts where neither conditions nor known codes have rows.
        Raises ValueError while gradient checkpointing, which keeps no cache, is at work.
        """
        if self.training and self.is_gradient_checkpointing:
            raise ValueError("call eval() before generate(): gradient checkpointing keeps no cache")
        settings = copy.deepcopy(generation_config or self.generation_config)
        settings.update(**options)
        conditions, frames = conditions or {}, frames or self.layout["frames"]
        rows = len(next(iter([*conditions.values(), *([] if known is None else [known])]), range(batch)))
        dropped = self.keep_all(rows) if dropped is None else dropped
        guided = settings.guidance_scale not in (None, 1.0) and self.parts
        if guided:  # the unconditioned pass rides in the same batch
            conditions = {name: codes.repeat(2, 1, 1) for name, codes in conditions.items()}
            dropped = torch.cat([dropped, torch.ones_like(dropped)])
        copies = 2 if guided else 1
        added, positions = self.added(conditions, dropped, frames), self.positions(conditions, frames)

        codes = torch.zeros(rows, frames, self.quantizers, dtype=torch.long, device=self.heads.device)
        first_free = 0 if known is None else known.shape[1]
        if known is not None:
            codes[:, :first_free] = known
        # Steps before the first one that predicts a free code take in known codes only, so they run in one pass.
        start = min(first_free * self.stride, self.steps(frames) - 1)
        ready = self.embed_codes(codes)[:, : start + 1].repeat(copies, 1, 1) + added[:, : start + 1]
        step_in, cache = torch.cat([self.embed_prefix(conditions, dropped), ready], dim=1), DynamicCache()
        for step in range(start, self.steps(frames)):
            hidden = self.run(step_in, positions, cache)[:, -1]
            taken_in = self.heads.new_zeros(rows, 1, self.heads.shape[-1])
            for frame, quantizer in self.codes_at(step, frames):
                if frame >= first_free:
                    logits = F.linear(hidden, self.heads[quantizer]).float()
                    if guided:
                        conditioned, free = logits.chunk(2)
                        logits = free + settings.guidance_scale * (conditioned - free)
                    codes[:, frame, quantizer] = draw(logits, settings)
                ids = codes[:, frame, quantizer, None] + self.first_ids[quantizer]
                taken_in = taken_in + self.model.embed_tokens(ids)
            step_in = taken_in.repeat(copies, 1, 1) + added[:, step + 1 : step + 2]
        return codes


def draw(logits: Tensor, settings: GenerationConfig) -> Tensor:
    """Codes `[B]` from `logits [B, C]`: the likeliest, or at random."""
    if not settings.do_sample:
        return logits.argmax(dim=-1)
    warpers: list[Any] = [TemperatureLogitsWarper(float(settings.temperature or 1.0))]  # None under transformers 5
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if (settings.top_p or 1.0) < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
