"""A preprocessing step as a user would write one: how loud each clip is at most, and which clip comes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.steps.base import Step
from data.waves import Waves


class Loudest(Step):
    def __init__(self, rate: int, scale: float = 1.0) -> None:
        self.scale = scale
        self.kinds = [(rate, 1)]
        self.columns = {"loudest": "float32", "clip": "str"}

    def arrays(self, batch: Waves) -> dict[str, Sequence[Any]]:
        peaks = batch.waves[self.kinds[0]].abs().amax(1) * self.scale
        return {"loudest": peaks.numpy().astype(np.float32), "clip": [clip.id for clip in batch.clips]}


class Twice(Step):
    def __init__(self) -> None:
        self.columns = {"semantic": "ndarray:uint16"}
