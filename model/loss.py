"""Linear layer and cross-entropy in one, without a tensor of all logits.

Shapes are named by letters: N rows of hidden states, D their width, Q quantizers, C codes of a codebook, M codes of one
quantizer in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**20
"""Logits that exist at a time, at least; more only where hidden states are far larger."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward keeps one number a code, the log of the sum of exponentials; backward makes the logits again.

    That costs one more product with the head, and only hidden states, which exist anyhow, are held in between.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, heads_QCD: Tensor, rows_QM: Tensor, targets_QM: Tensor) -> Tensor:
        wide = _wide(heads_QCD)
        normalizers = hidden_ND.new_empty(targets_QM.shape, dtype=wide)
        losses = []
        for q, head in enumerate(heads_QCD):
            total = hidden_ND.new_zeros((), dtype=wide)
            for part in _chunks(hidden_ND, heads_QCD, rows_QM):
                logits = F.linear(hidden_ND[rows_QM[q, part]], head).to(wide)
                normalizers[q, part] = logits.logsumexp(dim=-1)
                total += (normalizers[q, part] - logits.gather(1, targets_QM[q, part, None])[:, 0]).sum()
            losses.append(total / rows_QM.shape[1])
        ctx.save_for_backward(hidden_ND, heads_QCD, rows_QM, targets_QM, normalizers)
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden_ND, heads_QCD, rows_QM, targets_QM, normalizers = ctx.saved_tensors
        grad_hidden, grad_heads = torch.zeros_like(hidden_ND), torch.empty_like(heads_QCD)
        wide = _wide(heads_QCD)
        for q, head in enumerate(heads_QCD):
            grad_head = torch.zeros_like(head, dtype=wide)
            for part in _chunks(hidden_ND, heads_QCD, rows_QM):
                rows = rows_QM[q, part]
                chunk = hidden_ND[rows]
                grad = F.linear(chunk, head).to(wide).sub_(normalizers[q, part, None]).exp_()
                grad.scatter_add_(1, targets_QM[q, part, None], grad.new_full((len(rows), 1), -1.0))
                grad = grad.mul_(grad_Q[q] / rows_QM.shape[1]).to(head.dtype)
                grad_head += grad.t() @ chunk
                # A row may predict several quantizers; within one quantizer no row comes twice.
                grad_hidden[rows] += grad @ head
            grad_heads[q] = grad_head
        return grad_hidden, grad_heads, None, None


def _chunks(hidden_ND: Tensor, heads_QCD: Tensor, rows_QM: Tensor) -> list[slice]:
    """Slices of the codes of one quantizer, so small that logits take little beside the hidden states."""
    size = max(1, max(CHUNK, hidden_ND.numel() // 64) // heads_QCD.shape[1])
    return [slice(start, start + size) for start in range(0, rows_QM.shape[1], size)]


def linear_cross_entropy(hidden_ND: Tensor, heads_QCD: Tensor, rows_QM: Tensor, targets_QM: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each quantizer, `[Q]` in fp32 or better.

    Row `rows_QM[q, m]` of the hidden states predicts code `targets_QM[q, m]` through `heads_QCD[q]`; within a quantizer
    rows are distinct.
    """
    return _LinearCrossEntropy.apply(hidden_ND, heads_QCD, rows_QM, targets_QM)  # type: ignore[no-any-return]


@torch.no_grad()
def losses_and_accuracies(hidden_ND: Tensor, heads_QCD: Tensor, rows_QM: Tensor, targets_QM: Tensor) -> Tensor:
    """What `linear_cross_entropy` gives, and the share of codes to which the logits give the most: `[2, Q]`, without a
    gradient."""
    wide = _wide(heads_QCD)
    totals = hidden_ND.new_zeros(2, len(heads_QCD), dtype=wide)
    for q, head in enumerate(heads_QCD):
        for part in _chunks(hidden_ND, heads_QCD, rows_QM):
            logits, targets = F.linear(hidden_ND[rows_QM[q, part]], head).to(wide), targets_QM[q, part]
            totals[0, q] += F.cross_entropy(logits, targets, reduction="sum")
            totals[1, q] += (logits.argmax(dim=-1) == targets).sum()
    return totals / rows_QM.shape[1]


def linear_cross_entropy_reference(hidden_ND: Tensor, heads_QCD: Tensor, rows_QM: Tensor, targets_QM: Tensor) -> Tensor:
    """The same by way of all logits: what `linear_cross_entropy` is compared with."""
    logits_QMC = torch.einsum("qmd,qcd->qmc", hidden_ND[rows_QM], heads_QCD)
    return F.cross_entropy(logits_QMC.to(_wide(logits_QMC)).transpose(1, 2), targets_QM, reduction="none").mean(dim=1)


def _wide(tensor: Tensor) -> torch.dtype:
    """The type for exponentials and sums: fp32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32)
