"""How well a fitted quantizer does: the error it leaves and the codes it uses, level by level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.corpus import Clip
from data.ranks import Ranks
from model.kmeans import ResidualKMeans
from trainer.encodings import Encoding, read_waves


class Tally:
    """Counts the codes and adds up the errors of vectors as they come."""

    def __init__(self, quantizer: ResidualKMeans) -> None:
        self.quantizer = quantizer
        self.counts = torch.zeros(quantizer.levels, quantizer.codebook_size, dtype=torch.float64)
        self.errors = torch.zeros(quantizer.levels, dtype=torch.float64)
        self.sums = torch.zeros(quantizer.dim, dtype=torch.float64)
        self.squares = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Takes in vectors `[n, dim]`."""
        self.sums += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum()
        residual = x
        for level, codes in enumerate(self.quantizer.encode(x).T):
            residual = residual - self.quantizer.centroids[level, codes]
            self.errors[level] += residual.double().square().sum()
            self.counts[level] += torch.bincount(codes, minlength=self.quantizer.codebook_size)

    def result(self, ranks: Ranks) -> dict[str, Any] | None:
        """Over the vectors of all ranks: how many there are; for each level the share of their variance left after it,
        the share of its codes that are used, and the perplexity of the codes. None where there are no vectors.
        """
        for total in (self.counts, self.errors, self.sums, self.squares):
            ranks.sum_(total)
        number = self.counts[0].sum()
        if not number:
            return None
        variance = (self.squares - self.sums.square().sum() / number).clamp_min(1e-12 * number)
        entropy = torch.special.entr(self.counts / number).sum(1)
        return {
            "vectors": int(number),
            "variance_left": (self.errors / variance).tolist(),
            "usage": (self.counts > 0).double().mean(1).tolist(),
            "perplexity": entropy.exp().tolist(),
        }


def measure(
    corpus: Path, splits: dict[str, list[Clip]], encoding: Encoding, quantizer: ResidualKMeans, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Kind of vector → split → how well `quantizer` does on the vectors of its clips, of which each rank encodes its
    share. What has no vectors is left out."""
    measured: dict[str, dict[str, Any]] = {}
    for split, clips in splits.items():
        tallies = {kind: Tally(quantizer) for kind in encoding.kinds}
        for done, waves in read_waves(corpus, clips, encoding.sample_rate, ranks):
            for kind, vectors in encoding.vectors(clips[done - len(waves) : done], waves).items():
                tallies[kind].add(vectors)
        for kind, tally in tallies.items():
            if result := tally.result(ranks):
                measured.setdefault(kind, {})[split] = result
    return measured
