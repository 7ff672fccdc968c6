"""Which stretches of which parameters a rank holds in fp32, under any ZeRO choice: what checkpoints are made of.

The other half of the seam to DeepSpeed, whose optimizers each keep the weights in flat tensors of their own. Seen
through here a checkpoint knows nothing of ZeRO: a rank writes the stretches it holds, and reads those it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from trainer.optimizer import AdamW
from trainer.tensor_files import WEIGHTS


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + count` of a parameter, flattened, as this rank holds them."""

    name: str
    start: int
    count: int
    tensors: dict[str, Tensor]
    """fp32 `[count]`, by "weights" and the names of the optimizer's state: views, for writing too."""

    def share(self, rank: int, world_size: int) -> Fragment:
        """The part of it that `rank` writes, where all ranks hold the same."""
        first, last = (self.count * number // world_size for number in (rank, rank + 1))
        tensors = {key: value[first:last] for key, value in self.tensors.items()}
        return Fragment(self.name, self.start + first, last - first, tensors)


def replicated(engine: Any) -> bool:
    """Whether every rank holds all of every parameter: no ZeRO."""
    return engine.zero_optimization_stage() == 0


def unseen_norm(outer: Any) -> Callable[[], Tensor]:
    """Has a ZeRO optimizer step without a look at the gradient's norm, for which ZeRO-3, and 1 and 2 in fp32, would
    wait for the device at every step. Returns what gives that norm, infinite or negative where it is not finite.

    The optimizer within looks at it on the device, and leaves out what is not finite.
    """
    if isinstance(outer, BF16_Optimizer):
        return lambda: torch.as_tensor(outer._global_grad_norm)
    partitioned = isinstance(outer, DeepSpeedZeroOptimizer_Stage3)
    name, fine = ("_get_norm_groups", [0.0]) if partitioned else ("scaled_global_norm", 0.0)
    compute = getattr(outer, name)
    norms: list[Tensor] = []

    def keep() -> Any:
        norms[:] = [combine_grad_norm_groups(compute()) if partitioned else compute()]
        return fine

    setattr(outer, name, keep)
    return lambda: norms[0]


def fragments(engine: Any, optimizer: AdamW, change: bool = False) -> Iterator[Fragment]:
    """All that this rank holds, each with its tensors at hand only until the next one is asked for.

    With `change` the tensors may be written to; the weights that the model computes with follow at the end, for which
    all ranks must go through to it.
    """
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    outer = engine.optimizer

    def fragment(parameter: Tensor, flat: Tensor, offset: int, start: int, count: int) -> Fragment:
        state = optimizer.initialise(flat)
        whole = {WEIGHTS: flat.detach(), **{key: state[key] for key in optimizer.kept}}
        held = {key: value.view(-1).narrow(0, offset, count) for key, value in whole.items()}
        return Fragment(names[parameter], start, count, held)

    if isinstance(outer, DeepSpeedZeroOptimizer_Stage3):
        yield from _partitioned(outer, fragment, change)
    elif isinstance(outer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        yield from _flattened(outer, fragment, change)
    elif isinstance(outer, FP16_UnfusedOptimizer):
        for lows, highs in zip(outer.fp16_groups, outer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                yield fragment(low, high, 0, 0, high.numel())
                if change:
                    low.data.copy_(high.data)
    elif outer is optimizer:
        for parameter in names:
            yield fragment(parameter, parameter, 0, 0, parameter.numel())
    else:  # a wrapper of DeepSpeed's that none of our files leads to: to guess its layout could save wrong weights
        raise NotImplementedError(f"checkpoints of {type(outer).__name__} are not known how to be made")


def _flattened(outer: Any, fragment: Callable[..., Fragment], change: bool) -> Iterator[Fragment]:
    """ZeRO-1 and 2: a group of parameters lies end to end in one flat tensor, of which each rank has a stretch."""
    bf16 = isinstance(outer, BF16_Optimizer)
    groups = outer.bf16_groups if bf16 else outer.bit16_groups
    flats = outer.fp32_groups_flat_partition if bf16 else outer.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            held = parameter._hp_mapping
            if held is not None:
                low, high = held.lp_fragment_address, held.hp_fragment_address
                yield fragment(parameter, flat, high.start, low.start, low.numel)
    if change:
        outer.update_lp_params()


def _partitioned(outer: Any, fragment: Callable[..., Fragment], change: bool) -> Iterator[Fragment]:
    """ZeRO-3: each parameter is cut into equal stretches, the last one padded, and those of a rank lie in flat tensors
    that may be swapped out."""
    rank = dist.get_rank(group=outer.dp_process_group)
    if change:
        outer._partition_all_parameters()
    for number, group in enumerate(outer.fp16_groups):
        with _swapped_in(outer, number, change) as flat:
            for parameter in group:
                _, offset, size = outer.grad_position[outer.get_param_id(parameter)]
                count = max(0, min(size, parameter.ds_numel - rank * size))
                if count:
                    yield fragment(parameter, flat, offset, rank * size, count)
            if change:
                outer._reassign_or_swap_out_partitioned_parameters(number)
    if change:
        outer._post_step(set())


def gathered(engine: Any, optimizer: AdamW, key: str) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-3: name and whole fp32 value of every parameter, by "weights", or by a name of the optimizer's state. What
    is swapped out is read once. All ranks must iterate."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    outer = engine.optimizer
    for number, group in enumerate(outer.fp16_groups):
        with _swapped_in(outer, number) as flat:
            held = flat.detach() if key == WEIGHTS else optimizer.initialise(flat)[key]
            for parameter in group:
                _, offset, size = outer.grad_position[outer.get_param_id(parameter)]
                yield names[parameter], outer._fp32_state_allgather(parameter, held.narrow(0, offset, size))


@contextlib.contextmanager
def _swapped_in(outer: Any, number: int, change: bool = False) -> Iterator[Tensor]:
    """Weights of a group of ZeRO-3's, flat, which are in memory meanwhile, as is the optimizer's state. With `change`
    they are written back where they were swapped out."""
    flat = outer.fp32_partitioned_groups_flat[number]
    if not outer._swappable_optimizer_subgroup(number):
        yield flat
        return
    outer._optimizer_states_and_gradient_swap_in(number)
    new = not outer.optimizer.state.get(flat)  # what is made of it meanwhile is in no file yet
    yield flat
    if change or new:
        outer._optimizer_states_and_gradient_swap_out(number)
    else:
        outer._release_swap_buffers(number)


def updates(optimizer: AdamW) -> int:
    """How often the weights were changed; steps that were left out do not count."""
    counts = (state["step"] for state in optimizer.state.values() if "step" in state)
    return int(next(counts, torch.zeros(())).item())


def set_updates(optimizer: AdamW, count: int) -> None:
    """Tells every piece of the weights how often it was changed; their state must have been made."""
    for state in optimizer.state.values():
        state["step"].fill_(count)
