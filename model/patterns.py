"""How the codes of several quantizers are laid out over decoder steps.

`flat` predicts one code a step, frame by frame (MusicLM, Agostinelli et al. 2023, section 3.1); `delay` predicts one
code of every quantizer a step, quantizer q running q frames late (MusicGen, Copet et al. 2023, section 2.3). Both place
the code of frame t and quantizer q at step `t * stride + q`, so a pattern is no more than its stride, and the steps of
one quantizer are a strided slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pattern:
    """The layout of `frames` × `quantizers` codes over `steps` decoder steps.

    Step s predicts the codes that lie at s and takes in the codes that lie at s - 1; step 0 takes in the start token.
    """

    frames: int
    quantizers: int
    stride: int

    @classmethod
    def of(cls, kind: Literal["flat", "delay"], frames: int, quantizers: int) -> Pattern:
        return cls(frames, quantizers, stride={"flat": quantizers, "delay": 1}[kind])

    @property
    def steps(self) -> int:
        return (self.frames - 1) * self.stride + self.quantizers

    def steps_of(self, quantizer: int) -> slice:
        """The steps that predict `quantizer`, one a frame, in order."""
        return slice(quantizer, quantizer + (self.frames - 1) * self.stride + 1, self.stride)

    def codes_at(self, step: int) -> Iterator[tuple[int, int]]:
        """The (frame, quantizer) pairs that lie at `step`."""
        for quantizer in range(self.quantizers):
            frame, remainder = divmod(step - quantizer, self.stride)
            if remainder == 0 and 0 <= frame < self.frames:
                yield frame, quantizer

    def frame_of(self, step: int) -> int:
        """The frame whose moment `step` belongs to: that of the first code it predicts."""
        return min(step // self.stride, self.frames - 1)

    def time_of(self, step: int) -> float:
        """The same moment in frames, with the steps inside one frame spread evenly over it."""
        return step / self.stride
