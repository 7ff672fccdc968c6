"""Typed configuration of stage training. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data.config import Address
from data.filters import Filter
from model.config import Config, ExecutionConfig, StageModelConfig

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(|kb|mb|gb|tb|pb)", re.IGNORECASE)


class MixConfig(Config):
    """Tokens that are trained on beside the run's own."""

    tokens: str
    """A tokens folder, a run folder that has one, or `s3://bucket/prefix` or `gs://bucket/prefix` of one."""
    weight: PositiveFloat = 1.0
    """Its part of the windows, relative to the others' and to own_weight."""


class PhaseConfig(Config):
    """A part of the training."""

    steps: PositiveInt | None = None
    """Optimizer steps that it lasts; only the last phase has none, and lasts to the end."""
    filter: Filter = Field({})
    """As `train.filter`, which records must pass as well."""
    weights: list[NonNegativeFloat] | None = None
    """In place of own_weight and of the weights of `mix`, in that order."""


class TrainConfig(ExecutionConfig):
    """How a stage is trained."""

    steps: PositiveInt = 1000
    ranks: PositiveInt = 2
    """Processes (one GPU each where there are GPUs)."""
    global_batch: PositiveInt = 32
    """Windows a step, over all ranks."""
    micro_batch: PositiveInt | Literal["auto"] | None = None
    """Windows a rank and forward pass; global_batch / ranks when not given, the most that there is memory for with
    `auto`."""
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd", "plateau"] = "cosine"
    warmup_steps: NonNegativeInt = 50
    final_learning_rate: NonNegativeFloat = 0.0
    """Where the schedule ends, as a share of learning_rate."""
    decay_steps: PositiveInt | None = None
    """Last steps over which `wsd` decays; a fifth of all when not given."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    """What `plateau` multiplies the learning rate by."""
    plateau_patience: PositiveInt = 3
    """Validations without a better loss before it does."""
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay a step of an exponential moving average of the weights, kept beside them for the export; none without."""
    spike_threshold: PositiveFloat | None = 8.0
    """Standard deviations above the running mean at which a step's loss is a spike and the step left out; no spikes
    without. Steps whose loss or gradient is not finite are always left out."""
    most_bad_steps: PositiveInt = 10
    """Steps left out in a row that end the training."""
    precision: Literal["bf16", "fp32"] = "bf16"
    zero: str = "zero2"
    """A file of ds_configs/ (without .json), or a path to a DeepSpeed JSON file."""
    init_from: str | None = None
    """Weights that a new training begins with: a checkpoint, a trained stage, a folder of `stretto convert`, or a
    .safetensors file such as a bundle's. Fresh ones when not given."""
    packing: bool = False
    """Windows of a rank in one row without padding, so that clips shorter than window_seconds are windows too. Every
    code then counts alike, so a long window for more than a short one."""
    text_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a window is conditioned on its caption's tokens in place of its audio's."""
    workers: NonNegativeInt = 0
    """Data loader processes a rank."""
    mix: list[MixConfig] = Field([])
    """Further corpora."""
    own_weight: PositiveFloat = 1.0
    """Of the run's own corpus, where others are mixed with it."""
    filter: Filter = Field({})
    """Column of the manifest → a value, a list of values, or {min, max}: only records that pass are trained on."""
    curriculum: list[PhaseConfig] = Field([])
    """Phases with filters and weights of their own, one after another."""
    shuffle_block: PositiveInt = 65_536
    """Records of a corpus that are shuffled together; of remote corpora the cache should hold twice as many."""
    cache: str | None = None
    """Folder for shards that are remote or compressed; `RUN/cache` when not given."""
    cache_limit: str | PositiveInt | None = None
    """Bytes, or such as `20gb`, that they may take there on a node for this stage; no limit when not given."""
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    validate_windows: PositiveInt | None = None
    """At most so many windows of the validation set, always the same; all when not given."""
    sample_every: PositiveInt | None = None
    """Steps between samples made into sound; none without."""
    checkpoint_every: PositiveInt = 200
    checkpoint_async: bool = True
    """Whether checkpoints are written beside the training, from copies."""
    keep_last: int = Field(2, ge=2)
    """Newest checkpoints that stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of it stay for good."""
    keep_best: str | None = None
    """A figure of the validation, such as `loss` or `text`: the checkpoint where it was lowest stays too."""
    upload: Address | None = None
    """`s3://bucket/prefix` or `gs://bucket/prefix` that finished checkpoints are copied to, and come back from where
    there is none here."""
    resume: Literal["auto", "always"] | PositiveInt = "auto"
    """`auto`: from the newest good checkpoint, from the start where there never was one. `always`: it is an error if
    there is none. A number: from the checkpoint of that step; later ones are removed."""
    hang_timeout: PositiveFloat = 600.0
    """Seconds without a sign of life after which a job ends."""
    startup_timeout: PositiveFloat = 1800.0
    """The same before the first step is done, when blocks may be compiled."""
    straggler_factor: float = Field(1.3, gt=1)
    """A rank that needs so many times the median for its part of a step is named in the log."""
    gc_every: PositiveInt = 1000
    """Steps between collections of Python's garbage, which all ranks do at the same step and never in between."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step that torch's profiler traces."""
    wandb: str | None = None
    """A Weights & Biases project that the metrics go to as well."""

    @property
    def collective_timeout(self) -> float:
        """Seconds after which a collective gives up: long after the watchdog, which says more."""
        return 2 * max(self.hang_timeout, self.startup_timeout)

    @property
    def cache_bytes(self) -> int | None:
        """`cache_limit` as a number."""
        if self.cache_limit is None or isinstance(self.cache_limit, int):
            return self.cache_limit
        match = SIZE.fullmatch(self.cache_limit.strip())
        if match is None:
            raise ValueError(f"cache_limit {self.cache_limit!r} must be a number of bytes, or one such as 20gb")
        powers = ("", "kb", "mb", "gb", "tb", "pb")
        return int(float(match[1]) * 1000 ** powers.index(match[2].lower()))

    @property
    def decay(self) -> int:
        """Steps over which `wsd` decays."""
        return self.decay_steps or max(1, self.steps // 5)

    def windows_a_pass(self, ranks: int) -> int:
        """Windows of each of `ranks` in a forward pass; at most so many, where that is to be found."""
        return self.micro_batch if isinstance(self.micro_batch, int) else max(1, self.global_batch // ranks)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        micro = self.windows_a_pass(self.ranks)
        if self.global_batch % (micro * self.ranks):
            raise ValueError(
                f"global_batch {self.global_batch} must be a multiple of ranks × micro_batch = {self.ranks} × {micro}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.schedule == "wsd" and self.warmup_steps + self.decay > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + decay_steps {self.decay} must be at most steps {self.steps}"
            )
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile {list(self.profile)} must name the first step before the last")
        self._check_curriculum()
        if self.cache_bytes == 0:
            raise ValueError("cache_limit must be more than 0")
        return self

    def _check_curriculum(self) -> None:
        *first, last = self.curriculum or [PhaseConfig()]
        if last.steps is not None or any(phase.steps is None for phase in first):
            raise ValueError("all phases of curriculum but the last need steps, and the last has none")
        if sum(phase.steps or 0 for phase in first) >= self.steps:
            raise ValueError(f"the last phase of curriculum would begin after the last of the {self.steps} steps")
        for phase in self.curriculum:
            weights, wanted = phase.weights, 1 + len(self.mix)
            if weights is not None and (len(weights) != wanted or not any(weights)):
                raise ValueError(
                    f"weights {weights} of curriculum must be {wanted} numbers, the own corpus's and each of mix's, "
                    f"and not all 0"
                )


class StageConfig(Config):
    """One of the three transformers: what it is and how it is trained."""

    model: StageModelConfig
    train: TrainConfig = TrainConfig()
