"""What a stage is trained on: corpora, how much of each, and which of their records, from one phase to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.epochs import Phase, Pool, Shuffled
from data.filters import Filter, passing
from data.token_corpus import TokenCorpus, shard_sizes
from model.errors import UserError

SHUFFLE_BLOCK = 65_536


@dataclass(frozen=True)
class Selection:
    """What is drawn in one phase."""

    weights: tuple[float, ...] = (1.0,)
    """Of each corpus."""
    filters: tuple[Filter, ...] = ()
    """All of which a record passes."""
    steps: int | None = None
    """How long; to the end where None."""


@dataclass(frozen=True)
class Mixture:
    """Corpora, the run's own first, and the phases in which they are drawn from."""

    corpora: tuple[TokenCorpus, ...]
    phases: tuple[Selection, ...] = field(default=(Selection(),))
    block: int = SHUFFLE_BLOCK
    """Records of a corpus that are shuffled together."""

    @classmethod
    def of(cls, tokens: Path) -> Mixture:
        """One corpus, all of it."""
        return cls((TokenCorpus.read(tokens),))

    def epochs(self, split: str, global_batch: int, at_once: int, seed: int) -> Shuffled:
        """The epochs of a training with `global_batch` windows a step, of which a forward pass of all ranks takes
        `at_once`.

        Raises UserError where a filter cannot be applied, or leaves a corpus that is drawn from empty, or all of them
        with fewer clips than a forward pass takes, which would then hold a clip twice.
        """
        phases = [self._phase(split, selection) for selection in self.phases]
        for number, phase in enumerate(phases):
            if phase.available < at_once:
                where = f" in phase {number + 1} of train.curriculum" if len(phases) > 1 else ""
                raise UserError(
                    f"{phase.available} clips are left to train on{where}, fewer than the {at_once} that all ranks "
                    f"together take in a forward pass (ranks × micro_batch): use more clips, a wider train.filter, "
                    f"fewer ranks or a smaller micro_batch."
                )
        return Shuffled(phases, self.records(split), global_batch, self.block, seed)

    def records(self, split: str) -> int:
        """Records of all corpora. Raises UserError where there is none."""
        count = sum(int(shard_sizes(corpus.index(split)).sum()) for corpus in self.corpora)
        if not count:
            raise UserError(f"there are no {split} clips in {self.corpora[0].address}.")
        return count

    def _phase(self, split: str, selection: Selection) -> Phase:
        pools, first, shards = [], 0, 0
        for corpus, weight in zip(self.corpora, selection.weights, strict=True):
            sizes = shard_sizes(corpus.index(split))
            rules = selection.filters if weight else ()
            kept = _kept(corpus, split, rules, int(sizes.sum()))
            shard = np.repeat(np.arange(shards, shards + len(sizes)), sizes)
            pools.append(Pool(first + np.flatnonzero(kept), shard[kept]))
            if weight and not len(pools[-1]):
                raise UserError(f"train.filter leaves nothing of {corpus.address}: no record of it passes.")
            first, shards = first + len(kept), shards + len(sizes)
        return Phase(pools, selection.weights, selection.steps)


def _kept(corpus: TokenCorpus, split: str, filters: tuple[Filter, ...], count: int) -> np.ndarray:
    """Which of the `count` records of a corpus pass all `filters`."""
    kept = np.ones(count, bool)
    rules = [rules for rules in filters if rules]
    columns = corpus.columns(split) if rules else {}
    for one in rules:
        kept &= passing(columns, one, corpus.address)
    return kept
