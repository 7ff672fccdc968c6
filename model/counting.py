"""What one stage costs, by formula: positions, parameters and FLOPs. Imports no torch, so that a plan is instant.

The formulas describe `model.transformer`; a test compares them with the module itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ConditionConfig, EncodersConfig, QuantizersConfig, StageModelConfig, TransformerConfig
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField

TRAINING_FACTOR = 3
"""Training costs three forward passes: the backward pass multiplies twice, by the weights and by the inputs."""


@dataclass(frozen=True)
class StageCount:
    """Size and cost of one stage. FLOPs are of one window's forward pass; a multiply-add counts as two."""

    prefix: int
    """Positions taken by prefix conditions."""
    steps: int
    """Positions that predict."""
    tokens: int
    """Tokens predicted."""
    embedding_parameters: int
    block_parameters: int
    head_parameters: int
    condition_parameters: int
    """Those of the `summed` path."""
    matmul_flops: int
    attention_flops: int

    @property
    def positions(self) -> int:
        """Length of the sequence the transformer sees."""
        return self.prefix + self.steps

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.block_parameters + self.head_parameters + self.condition_parameters

    @property
    def forward_flops(self) -> int:
        return self.matmul_flops + self.attention_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward of one window, without recomputation."""
        return TRAINING_FACTOR * self.forward_flops


def token_fields(encoders: EncodersConfig, quantizers: QuantizersConfig) -> dict[str, TokenField]:
    """The fields that these encoders and quantizers will write to the shards, by name."""
    codec = encoders.codec
    return {
        CONDITIONING: TokenField(
            CONDITIONING,
            1 / encoders.joint.hop_seconds,
            quantizers.conditioning.levels,
            quantizers.conditioning.codebook_size,
        ),
        SEMANTIC: TokenField(
            SEMANTIC, encoders.semantic.frame_rate, quantizers.semantic.levels, quantizers.semantic.codebook_size
        ),
        ACOUSTIC: TokenField(ACOUSTIC, codec.frame_rate, codec.quantizers, codec.codebook_size),
    }


def quantizers_used(part: StageModelConfig | ConditionConfig, fields: Mapping[str, TokenField]) -> range:
    """The quantizers of its field that a stage predicts, or that one of its conditions brings in."""
    return range(part.first, fields[part.field].quantizers if part.last is None else part.last)


def ffn_width(transformer: TransformerConfig) -> int:
    """Width of the SwiGLU: 8/3 × dim rounded up to a multiple of 64 when not given, which keeps a block's size near
    that of a plain 4 × dim feed-forward layer."""
    return transformer.ffn_dim or -(-8 * transformer.dim // (3 * 64)) * 64


def condition_frames(config: StageModelConfig, condition: ConditionConfig, fields: Mapping[str, TokenField]) -> int:
    """Frames of a condition in a window; a window is described by one joint-embedding row, however long it is."""
    return 1 if condition.field == CONDITIONING else fields[condition.field].frames(config.window_seconds)


def prefix_positions(config: StageModelConfig, fields: Mapping[str, TokenField]) -> int:
    """Positions before the first step: frames × quantizers of each prefix condition."""
    return sum(
        condition_frames(config, condition, fields) * len(quantizers_used(condition, fields))
        for condition in config.conditions
        if "prefix" in condition.paths
    )


def step_positions(config: StageModelConfig, fields: Mapping[str, TokenField]) -> int:
    """Positions that predict: one a token when flat; one a frame, plus the stagger of the last quantizer, when
    delayed."""
    frames, quantizers = fields[config.field].frames(config.window_seconds), len(quantizers_used(config, fields))
    return frames * quantizers if config.pattern == "flat" else frames + quantizers - 1


def embedding_rows(config: StageModelConfig, fields: Mapping[str, TokenField]) -> int:
    """Rows of the token table: one for each (field, quantizer, code) that enters as a token, one null row for each
    condition, the start row, and with forgetful masking the mask."""
    entering = [condition for condition in config.conditions if {"prefix", "aligned"} & set(condition.paths)]
    parts: list[StageModelConfig | ConditionConfig] = [config, *entering]
    used = {(part.field, quantizer) for part in parts for quantizer in quantizers_used(part, fields)}
    codes = sum(fields[name].codebook_size for name, _ in used)
    return 1 + codes + len(config.conditions) + (config.forgetful_masking > 0)


def block_matrices(transformer: TransformerConfig) -> int:
    """Parameters of one block's matrices: q, k, v, o and the three of the SwiGLU."""
    dim, head_dim = transformer.dim, transformer.dim // transformer.heads
    kv_dim = head_dim * (transformer.kv_heads or transformer.heads)
    return 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * ffn_width(transformer)


def block_norms(transformer: TransformerConfig) -> int:
    """Parameters of one block's RMSNorms."""
    return 2 * transformer.dim + (2 * (transformer.dim // transformer.heads) if transformer.qk_norm else 0)


def count_stage(
    config: StageModelConfig, fields: Mapping[str, TokenField], centroid_dims: Mapping[str, int]
) -> StageCount:
    """Counts one stage on windows of `config.window_seconds`.

    `centroid_dims` gives the width of the centroids of every field that enters by the `summed` path. Attention counts
    the pairs a causal mask leaves; embeddings, norms and activations are not counted as FLOPs.
    """
    transformer, field = config.transformer, fields[config.field]
    dim, layers = transformer.dim, transformer.layers
    quantizers = len(quantizers_used(config, fields))
    tokens = field.frames(config.window_seconds) * quantizers
    prefix, steps = prefix_positions(config, fields), step_positions(config, fields)
    positions = prefix + steps
    summed = [part for part in config.conditions if "summed" in part.paths]
    mlps = [centroid_dims[part.field] * dim + dim * dim for part in summed]
    mlp_uses = sum(condition_frames(config, part, fields) * size for part, size in zip(summed, mlps, strict=True))
    # Whatever the pattern, every token is scored once against its quantizer's codebook.
    head = tokens * field.codebook_size * dim
    return StageCount(
        prefix=prefix,
        steps=steps,
        tokens=tokens,
        embedding_parameters=embedding_rows(config, fields) * dim,
        block_parameters=layers * (block_matrices(transformer) + block_norms(transformer)) + dim,
        head_parameters=quantizers * field.codebook_size * dim,
        condition_parameters=sum(mlps) + len(mlps) * dim,
        matmul_flops=2 * (positions * layers * block_matrices(transformer) + head + mlp_uses),
        attention_flops=2 * 2 * layers * dim * positions * (positions + 1) // 2,
    )


def activation_bytes(config: StageModelConfig, fields: Mapping[str, TokenField], recompute: str = "none") -> int:
    """Bytes that the forward pass of one window keeps for the backward pass, in bf16.

    For each position and layer: the inputs of both norms and what they give (4 × dim), queries, keys and values and,
    where they are normed, again (3 to 5 × dim), the output of attention (dim) and four tensors of the SwiGLU (4 × its
    width). With `recompute` the blocks keep their input alone (`block`), or with it the results of matrix products and
    of attention (`selective`), and one block at a time has all. Then two hidden states, of which the loss makes its
    logits. An estimate: kernels that fuse keep less.
    """
    transformer = config.transformer
    dim, ffn = transformer.dim, ffn_width(transformer)
    whole = (10 if transformer.qk_norm else 8) * dim + 4 * ffn
    kept = {"none": whole, "block": dim, "selective": 7 * dim + 2 * ffn}[recompute]
    layers = transformer.layers * kept + (whole if recompute != "none" else 0)
    return 2 * (prefix_positions(config, fields) + step_positions(config, fields)) * (layers + 2 * dim)
