"""Typed configuration of everything in `model/`. Imports no torch, so that the command line stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Config(BaseModel):
    """Base of every section of a recipe: unknown keys are errors and values do not change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Probability = Annotated[float, Field(gt=0, le=1)]


EncoderDtype = Literal["auto", "fp32", "bf16", "fp16"]


class CodecConfig(Config):
    """Waveform ↔ acoustic tokens. Always computed in fp32: in bf16 EnCodec gives other codes for 83 % of the frames."""

    kind: Literal["mel", "encodec"] = "mel"
    weights: str | None = None
    """Folder or hub id of pretrained weights, or a checkpoint of the encodec library (.th); the built-in codec is
    fitted in the run and has none."""
    sample_rate: PositiveInt = 16_000
    """EnCodec has a model for 24000 (mono) and one for 48000 (stereo)."""
    frame_rate: PositiveInt = 25
    """Code frames a second."""
    quantizers: PositiveInt = 8
    """Codes a frame; the first of EnCodec at 48 kHz is the loudness."""
    codebook_size: int = Field(256, ge=2, le=65_536)
    mel_bands: PositiveInt = 100
    fit_clips: PositiveInt = 400
    """Training clips the built-in codec's codebooks are fitted on."""


class SemanticEncoderConfig(Config):
    """Waveform → features whose k-means codes are the semantic tokens."""

    kind: Literal["mel_chroma", "mert", "hubert"] = "mel_chroma"
    weights: str | None = None
    """Folder or hub id of pretrained weights."""
    layer: int = 7
    """Transformer layer whose output is used (MERT, HuBERT)."""
    sample_rate: PositiveInt = 16_000
    frame_rate: PositiveInt = 25
    dtype: EncoderDtype = "auto"
    """What a pretrained encoder computes in; auto is bf16 on a GPU and fp32 on a CPU."""
    standardise: bool = False
    """Whether each feature is brought to mean 0 and variance 1 over its numbers, as k-means of open-musiclm want it."""


class JointEmbedderConfig(Config):
    """Audio and text → one space."""

    kind: Literal["towers", "clap"] = "towers"
    weights: str | None = None
    """Folder or hub id of pretrained weights, or a checkpoint of laion-clap (.pt)."""
    tokenizer: str | None = None
    """Folder or hub id of RoBERTa's tokenizer for a checkpoint of laion-clap; when not given, the checkpoint's own
    folder, then roberta-base."""
    dtype: EncoderDtype = "auto"
    """What CLAP computes in; auto is bf16 on a GPU and fp32 on a CPU."""
    sample_rate: PositiveInt = 16_000
    window_seconds: PositiveFloat = 5.0
    """Seconds of audio one embedding describes."""
    hop_seconds: PositiveFloat = 5.0
    """Seconds between two embeddings of one clip."""
    dim: PositiveInt = 128
    width: PositiveInt = 128
    """Channels of the built-in audio tower and width of the text tower."""
    vocabulary: PositiveInt = 512
    steps: PositiveInt = 400
    batch: PositiveInt = 128
    learning_rate: PositiveFloat = 2e-3


class EncodersConfig(Config):
    codec: CodecConfig = CodecConfig()
    semantic: SemanticEncoderConfig = SemanticEncoderConfig()
    joint: JointEmbedderConfig = JointEmbedderConfig()
    check: bool = True
    """Whether a run starts with a check that the encoders are not damaged or untrained."""


class KMeansConfig(Config):
    """One residual k-means."""

    levels: PositiveInt = 1
    codebook_size: int = Field(256, ge=2, le=65_536)
    iterations: PositiveInt = 20
    """At most this many passes over all vectors for each level."""
    fit_vectors: PositiveInt | None = 50_000
    """At most this many vectors, sampled over the training clips, are used; all of them when null. They are kept on the
    disk while the fit lasts: the memory it takes does not depend on them."""
    start: Literal["kmeans++", "sample"] = "kmeans++"
    """What a level starts from: vectors drawn far from each other, or drawn evenly, which takes less time."""
    centroids: str | None = None
    """Folder of quantizers, such as `stretto import-quantizers` makes, whose centroids are taken in place of fitting;
    `levels` and `codebook_size` must be theirs."""


class QuantizersConfig(Config):
    conditioning: KMeansConfig = KMeansConfig(levels=8, codebook_size=64)
    semantic: KMeansConfig = KMeansConfig(levels=1, codebook_size=256)


class ConditionConfig(Config):
    """One field a stage conditions on, and the paths by which it enters."""

    field: Literal["conditioning", "semantic", "acoustic"]
    first: int = Field(0, ge=0)
    """First quantizer used."""
    last: int | None = None
    """One past the last quantizer used; all when not given."""
    paths: list[Literal["prefix", "aligned", "summed"]] = Field(["prefix"], min_length=1)
    """prefix: earlier tokens of the stream; aligned: added to each step at the same moment; summed: the sum of the
    codes' centroids through a small MLP, added to each step."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a training window loses this condition alone, beside the loss of all (condition_dropout)."""


class TransformerConfig(Config):
    """A Llama-shaped decoder (with `qk_norm`, Qwen3-shaped)."""

    dim: PositiveInt = 256
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    """Key/value heads for grouped-query attention; as many as heads when not given."""
    ffn_dim: PositiveInt | None = None
    """Width of the SwiGLU; 8/3 × dim rounded up to a multiple of 64 when not given."""
    qk_norm: bool = True
    rope_theta: PositiveFloat = 10_000.0
    residual_init: Literal["depth", "plain"] = "depth"
    """depth: the two matrices of a block that write into the residual stream start smaller by sqrt(2 × layers) (GPT-2);
    plain: they start like the others."""
    mup_base_dim: PositiveInt | None = None
    """Width at which the learning rate was tuned: starts and learning rates of the matrices are scaled from there to
    `dim` (μP, Yang et al. 2022), so that it holds for wider models too. Not scaled when not given."""

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self


class StageModelConfig(Config):
    """What one stage conditions on, predicts, and with which transformer."""

    field: Literal["semantic", "acoustic"]
    """The field it predicts."""
    first: int = Field(0, ge=0)
    last: int | None = None
    conditions: list[ConditionConfig] = []
    window_seconds: PositiveFloat = 5.0
    pattern: Literal["flat", "delay"] = "flat"
    positions: Literal["time", "index"] = "time"
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that a training window loses all its conditions (what classifier-free guidance needs)."""
    forgetful_masking: float = Field(0.0, ge=0, lt=1)
    """Largest share of its own past that a training window forgets: for each window a share is drawn between 0 and
    this, and so many of the stream's codes are replaced by a learnt mask where they are taken in (after forgetful
    causal masking, Liu et al. 2022, which hides them from attention instead)."""
    transformer: TransformerConfig = TransformerConfig()


AttentionName = Literal["auto", "math", "sdpa", "flash2", "flash3", "flash4"]
KernelsName = Literal["torch", "liger"]


class ExecutionConfig(Config):
    """How a stage is computed, not what: results differ by rounding alone."""

    attention: AttentionName = "auto"
    """Attention kernel; auto takes the best that works here."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto is on for a GPU."""
    kernels: KernelsName = "torch"
    """Kernels for norms, rotary positions and SwiGLU: torch's, which compiled blocks fuse, or those of liger-kernel,
    for blocks on a GPU that are not compiled."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activations made again in the backward pass, to save memory: none; all inside a block; or the cheap ones, keeping
    the results of matrix products and of attention."""

    @field_validator("compile", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """YAML reads a bare `on` or `off` as a truth value."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


StageName = Literal["semantic", "coarse", "fine"]
STAGES: tuple[StageName, ...] = ("semantic", "coarse", "fine")
"""The order in which the stages make music."""


class SamplingConfig(Config):
    """How a bundle draws codes when nothing else is said; a stage that is not named has the plain value."""

    temperature: dict[StageName, NonNegativeFloat] = {}
    """1 when not given; 0 takes the most likely code."""
    top_k: dict[StageName, PositiveInt] = {}
    """All codes when not given."""
    top_p: dict[StageName, Probability] = {}
    """The most likely codes whose probabilities reach this sum; 1, the plain value, is all."""
    cfg: dict[StageName, NonNegativeFloat] = {}
    """Guidance scale: 1, the plain value, is none."""
