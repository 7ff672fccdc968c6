"""Model FLOPs: what the windows of a step cost by formula, whatever the device does for them."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch

from model.counting import count_stage
from model.stage import StageTransformer
from trainer.hardware import peak_flops


class ModelFlops:
    """Model FLOPs utilisation as PaLM has it (Chowdhery et al. 2022, appendix B): the FLOPs of forward and backward
    pass that the model's formula asks for (`model.counting`), by what the device could do in that time. What is
    computed again to save memory does not count."""

    def __init__(self, model: StageTransformer, precision: str, device: torch.device) -> None:
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        self.peak = peak_flops(self.device_name, precision)
        """Dense peak FLOP/s of this rank's device; None where it is not known."""
        self._model = model
        self._dims = {part.field.name: part.centroids.shape[-1] for part in model.conditions if "summed" in part.paths}
        self._of_window = cache(self._count)

    def of(self, windows: Counter[int]) -> int:
        """FLOPs of training on so many windows of so many frames of the predicted field."""
        return sum(number * self._of_window(frames) for frames, number in windows.items())

    def _count(self, frames: int) -> int:
        seconds = float(frames / self._model.target.rate)
        config = self._model.config.model_copy(update={"window_seconds": seconds})
        return count_stage(config, self._model.fields, self._dims).training_flops
