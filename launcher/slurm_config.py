"""What a recipe says of Slurm. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_serializer

from model.config import Config

UNITS = {"m": 1, "h": 60, "d": 24 * 60}
KILOBYTES = {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}
SHORT = re.compile(r"([1-9]\d*)([mhd])")
SLURMS = re.compile(r"(\d+-\d+|\d+:\d\d)(:\d\d){0,2}")


def minutes(text: str) -> int:
    """A time limit such as 90m, 24h, 2d, or one that Slurm writes: 30:00, 24:00:00, 2-12, 2-12:00:00."""
    if match := SHORT.fullmatch(text):
        return int(match[1]) * UNITS[match[2]]
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # After days come hours first; without days two numbers are minutes and seconds.
    hours, *rest = parts if days or len(parts) == 3 else [0, *parts]
    seconds = 3600 * hours + sum(number * factor for number, factor in zip(rest, (60, 1), strict=False))
    return 24 * 60 * int(days or 0) + -(-seconds // 60)


def megabytes(text: str) -> int:
    """Memory as Slurm writes it: 900G, or 4000 for so many MB."""
    number = text.rstrip("KMGT")
    return -(-int(number) * KILOBYTES[text[len(number) :]] // 1024)


def _time(value: Any) -> Any:
    # YAML reads 1:00:00 as 3600, which nobody could tell from 3600 minutes.
    if value is not None and not (isinstance(value, str) and (SHORT.fullmatch(value) or SLURMS.fullmatch(value))):
        raise ValueError(f"{value!r} must be such as 90m, 24h, 2d or 2-12:00:00")
    return value


TimeLimit = Annotated[str, BeforeValidator(_time)]
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
"""Text that stays on the line of the script it is written to."""
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
Option = Annotated[str, Field(pattern=r"^-[^\n\r]+$")]


class SlurmJobConfig(Config):
    """What a job asks Slurm for."""

    partition: Line | None = None
    """The cluster's default when not given."""
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    """Features that nodes must have."""
    time: TimeLimit | None = None
    """Time limit of each job, such as 24h; the partition's when not given. What has not ended by then saves, and waits
    for its turn again."""
    nodes: PositiveInt = 1
    """The most that a stage may take."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a node, one for each rank; 0 asks for none."""
    tasks_per_node: PositiveInt | None = None
    """Ranks of a node without GPUs; as many as the largest `train.ranks` needs on `nodes` when not given."""
    cpus_per_task: PositiveInt | None = None
    mem: Memory | None = None
    """Memory of a node, such as 200G."""
    signal_seconds: NonNegativeInt = 300
    """How long before the time limit ranks are told to save; Slurm may tell them up to a minute earlier."""
    options: list[Option] = Field([])
    """Further options of sbatch, such as --exclusive."""
    setup: list[str] = Field([])
    """Lines of shell before the ranks are started, such as `module load cuda`."""


class SlurmConfig(SlurmJobConfig):
    """What the job of each stage asks Slurm for, by `stretto run --slurm`. Nothing of it rebuilds anything."""

    stages: dict[str, SlurmJobConfig] = Field({})
    """Keys of single stages, in place of those above: {tokens: {partition: cpu, gpus_per_node: 0}}."""

    @field_serializer("stages")
    def _as_given(self, stages: dict[str, SlurmJobConfig]) -> dict[str, dict[str, Any]]:
        # A default that was written out would be taken for the stage's own when it is read again.
        return {name: job.model_dump(exclude_unset=True) for name, job in stages.items()}

    def of(self, stage: str) -> SlurmJobConfig:
        """What the job of one stage asks for."""
        own = self.stages.get(stage)
        return self.model_copy(update={} if own is None else own.model_dump(exclude_unset=True))

    def key(self, stage: str, name: str) -> str:
        """Where the recipe says what `of(stage)` has as `name`."""
        own = self.stages.get(stage)
        return f"slurm.{name}" if own is None or name not in own.model_fields_set else f"slurm.stages.{stage}.{name}"
