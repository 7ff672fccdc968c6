"""What a preprocessing step is: something done to every clip beside its encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from data.corpus import Clip
from data.waves import Kind, Waves
from model.fields import TokenField


class Step:
    """A step that does nothing; a real one overrides what it needs.

    It is made once in each process with the keys of its entry in `tokens.steps`. Steps run in the order of that list,
    and each finds the clips and the audio as those before it have left them. What a step makes of a batch must depend
    on the batch alone, or else the tokens would change with the number of ranks; `audio` and `arrays` are called by
    several threads at once.
    """

    kinds: Sequence[Kind] = ()
    """The audio it hears: sample rates (Hz) and channels (1 or 2)."""
    columns: Mapping[str, str] = {}
    """What it adds to each record: the name of each column and how MDS stores it, such as "ndarray:float16"."""
    fields: Sequence[TokenField] = ()
    """Those of its columns that are tokens, integers `[frames, quantizers]` or, of one quantizer, `[frames]`."""

    def prepare(self, clips: Sequence[Clip]) -> list[Clip]:
        """All clips, rewritten where the step rewrites them; called once, before any work.

        They must stay as many, in their order, with their ids and lengths. Raises UserError where the step cannot do
        what it is asked for with these clips.
        """
        return list(clips)

    def audio(self, waves: dict[Kind, Tensor]) -> dict[Kind, Tensor]:
        """What the encoders and the steps after this one hear in place of `waves`, of the same kinds and shapes.

        Float32 `[clips, samples]`, or `[clips, channels, samples]` where there are several channels.
        """
        return waves

    def arrays(self, batch: Waves) -> dict[str, Sequence[Any]]:
        """For each of `columns` one value a clip. An array must not be empty: MDS cannot keep it."""
        return {}
