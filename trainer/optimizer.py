"""AdamW as every ZeRO choice runs it: it clips, leaves out a bad step and averages the weights, all without waiting for
the device.

DeepSpeed hands it flat pieces of the fp32 weights, so all it keeps (both moments, the average) is sharded as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""Name in the optimizer's state of the exponential moving average of the weights."""


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov & Hutter 2019), for one step of which the gradient is judged first.

    A step that `judge` was told to leave out, or whose gradient has a norm that is not finite, changes neither weights
    nor state. The kernel itself does that and the clipping (by `found_inf` and `grad_scale`, which torch's GradScaler
    uses), so that no number has to come to the host.

    With `average_decay` the weights are averaged after every step, w̄ ← d·w̄ + (1 - d)·w with
    d = min(average_decay, (1 + n) / (10 + n)) at update n, so that the start is soon forgotten.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        clip: float,
        average_decay: float | None,
        device: torch.device,
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=1e-8, fused=True)
        self.clip = clip
        self.average_decay = average_decay
        self.last_norm = torch.zeros((), device=device)
        """Norm of the last step's gradient before clipping."""
        self.skipped = torch.zeros((), device=device)
        """Whether the last step was left out, 0 or 1."""
        # DeepSpeed makes some optimizers step once as they are built: that is to make their state and change nothing.
        self._skip = torch.ones((), device=device)
        self.norm: Callable[[], Tensor] = self.own_norm
        """Norm of the whole gradient before clipping, over all ranks; what is not finite may be told by a negative."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the state tensors that are as large as the weights."""
        return MOMENTS if self.average_decay is None else (*MOMENTS, AVERAGE)

    def initialise(self, weights: Tensor) -> dict[str, Tensor]:
        """The state of one piece of the weights, made as the first step would make it."""
        state = self.state[weights]
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state.update({name: torch.zeros_like(weights) for name in MOMENTS})
        if self.average_decay is not None and AVERAGE not in state:
            state[AVERAGE] = weights.detach().clone()
        return state

    def judge(self, bad: Tensor) -> None:
        """Says, before a step, whether to leave it out: 0 or 1, fp32, on the device."""
        self._skip = bad
        # DeepSpeed itself leaves out some steps that are not finite; then `step` is never called.
        self.skipped, self.last_norm = torch.ones_like(bad), torch.full_like(bad, torch.inf)

    def own_norm(self) -> Tensor:
        """Norm of the gradients at hand, where every rank has all of them."""
        grads = [weights.grad for weights in self._weights() if weights.grad is not None]
        return torch.nn.utils.get_total_norm(grads).to(self._skip.device)

    def _weights(self) -> list[Tensor]:
        return [weights for group in self.param_groups for weights in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps the pieces in `param_groups` that have a gradient."""
        weights = [piece for piece in self._weights() if piece.grad is not None]
        for piece in weights:
            self.initialise(piece)
        self.last_norm = norm = self.norm()
        fine = torch.isfinite(norm) & (norm >= 0) & (self._skip == 0)
        self.skipped = 1.0 - fine.float()
        # A norm that is not a number must not reach the kernel even where it changes nothing.
        scale = torch.where(fine, ((norm + 1e-6) / self.clip).clamp(min=1.0), 1.0).float()
        for device in {piece.device for piece in weights}:
            # The kernel reads them where the weights are; offloaded ones wait for the gradient on the host anyway.
            self.found_inf, self.grad_scale = self.skipped.to(device), scale.to(device)
        super().step()
        if self.average_decay is not None:
            for piece in weights:
                self._average(piece, self.average_decay)

    def _average(self, piece: Tensor, decay: float) -> None:
        state = self.state[piece]
        updates = state["step"]
        share = 1.0 - ((1.0 + updates) / (10.0 + updates)).clamp(max=decay)
        state[AVERAGE].lerp_(piece, share * (1.0 - self.found_inf.to(piece.device)))
