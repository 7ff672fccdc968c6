"""How a field that a stage conditions on enters its stream.

Shapes are named by letters: B batch, D model width, S decoder steps.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ConditionConfig
from model.counting import quantizers_used
from model.fields import CONDITIONING, TokenField
from model.patterns import Pattern


@lru_cache(maxsize=64)
def aligned_frames(pattern: Pattern, field: TokenField, target: TokenField, device: torch.device) -> Tensor:
    """`[S]`: for each step of `pattern` over `target`, the frame of `field` that sounds at the same moment."""
    ratio = field.rate / target.rate
    frames = [floor(pattern.frame_of(step) * ratio) for step in range(pattern.steps)]
    with torch.inference_mode(False):  # made while sampling, it must still serve training
        return torch.tensor(frames, device=device)


class Condition(nn.Module):
    """One field a stage conditions on, and the paths by which it enters the stream."""

    centroids: Tensor
    offsets_Q: Tensor

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
        self.register_buffer("offsets_Q", torch.tensor(self.offsets), persistent=False)
        if "summed" in config.paths:
            shape = (len(self.quantizers), self.field.codebook_size, centroid_dim)
            # Not in the state: it is the quantizer's, and is kept in one place.
            self.register_buffer("centroids", torch.zeros(shape), persistent=False)
            self.sum_in = nn.Linear(centroid_dim, dim, bias=False)
            self.sum_out = nn.Linear(dim, dim, bias=False)
            self.sum_null = nn.Parameter(torch.zeros(dim))

    def load_centroids(self, centroids: Tensor) -> None:
        """Takes the residual codebooks `[quantizers, codebook size, centroid dim]` of the field.

        They are scaled so that a typical sum of centroids has unit variance, which is what the MLP's start expects.
        """
        chosen = centroids[self.quantizers.start : self.quantizers.stop].float()
        self.centroids.copy_(chosen / chosen.pow(2).mean(dim=(1, 2)).sum().sqrt())

    def ids(self, codes: Tensor, dropped_B: Tensor) -> Tensor:
        """Embedding ids `[B, frames, quantizers]`, the null id throughout a dropped window."""
        return torch.where(dropped_B[:, None, None], self.null_id, self.select(codes) + self.offsets_Q)

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
