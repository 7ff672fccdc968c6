"""From codes to the ids of a stage exported by Stretto as a stock Llama or Qwen3, and back.

This file needs torch and transformers alone: `stretto export-transformers` copies it beside the weights.

Shapes are named by letters: B batch, T frames of the predicted field, Q its predicted quantizers, N conditions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class StageCodes(LogitsProcessor):
    """Makes prompts of codes, keeps `generate` to the ids of the quantizer whose turn it is, and reads what came out.

    Ids are what the block `stretto` of the checkpoint's `config.json` says: the codes of every quantizer have a range
    of their own, and the stream is: ids of the conditions, the start id, then one code a step, quantizer by quantizer.

        model = AutoModelForCausalLM.from_pretrained(folder)
        codes = StageCodes(model.config)
        made = codes.decode(model.generate(codes.prompt(conditions), logits_processor=[codes]))
    """

    def __init__(self, config: Any) -> None:
        """`config` is the loaded model's."""
        self.layout: dict[str, Any] = config.stretto
        self.first_ids: list[int] = self.layout["predicts"]["first_ids"]

    def prompt(
        self,
        conditions: dict[str, Tensor] | None = None,
        known: Tensor | None = None,
        dropped: bool | Tensor = False,
        batch: int = 1,
    ) -> Tensor:
        """The ids that `generate` goes on from.

        `conditions` maps fields to codes `[B, frames, quantizers of the field]` that start where the window starts; the
        first frames of what is predicted may be `known [B, T, Q]`. Conditions in `dropped [B, N]`, in the order of the
        checkpoint's, are replaced by their learnt absence; True drops all, which is what guidance takes as
        `negative_prompt_ids`. `batch` counts where neither has rows. Raises ValueError for codes outside their
        codebook.
        """
        given = [*(conditions or {}).values(), *([] if known is None else [known])]
        rows, device = (len(given[0]), given[0].device) if given else (batch, None)
        parts = self.layout["conditions"]
        dropped_BN = torch.as_tensor(dropped, device=device).expand(rows, len(parts))
        ids = []
        for number, part in enumerate(parts):
            first = part["first_quantizer"]
            codes = (conditions or {})[part["field"]][..., first : first + part["quantizers"]]
            ids.append(torch.where(dropped_BN[:, number, None], part["null_id"], self._ids(part, codes)))
        ids.append(torch.full((rows, 1), self.layout["start_id"], device=device))
        if known is not None:
            ids.append(self._ids(self.layout["predicts"], known))
        return torch.cat(ids, dim=1)

    @staticmethod
    def _ids(part: dict[str, Any], codes: Tensor) -> Tensor:
        """`[B, frames × quantizers]`"""
        if codes.numel() and (codes.min() < 0 or codes.max() >= part["codebook_size"]):
            raise ValueError(f"codes of field {part['field']!r} must lie between 0 and {part['codebook_size'] - 1}")
        return (codes + torch.tensor(part["first_ids"], device=codes.device)).flatten(1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """`scores [B, ids]` with all but the codes of the quantizer whose turn it is at minus infinity."""
        step = input_ids.shape[1] - self._steps_start(input_ids)
        first = self.first_ids[step % len(self.first_ids)]
        turn = slice(first, first + self.layout["predicts"]["codebook_size"])
        kept = torch.full_like(scores, float("-inf"))
        kept[:, turn] = scores[:, turn]
        return kept

    def decode(self, sequences: Tensor) -> Tensor:
        """The codes `[B, T, Q]`, known ones included, of ids that `generate` returned, without a frame cut short."""
        ids = sequences[:, self._steps_start(sequences) :]
        frames = ids.shape[1] // len(self.first_ids)
        ids = ids[:, : frames * len(self.first_ids)].unflatten(1, (frames, len(self.first_ids)))
        return ids - torch.tensor(self.first_ids, device=ids.device)

    def _steps_start(self, ids: Tensor) -> int:
        """Where the codes begin. Conditions cover as much time as the window, so that a prefix has no fixed length; but
        nothing else than the start has its id."""
        return int((ids[0] == self.layout["start_id"]).nonzero()[0]) + 1
