"""What runs other kernels on a GPU than on a CPU gives the same there. Needs neither DeepSpeed nor data."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from benchmarks.memory import measure
from model import kernels
from model.attention import Attend, Packing, choose, math
from model.config import AttentionName, ExecutionConfig, TransformerConfig
from model.errors import UserError
from model.fields import ACOUSTIC
from model.kernels import TORCH, Kernels
from model.loss import linear_cross_entropy, linear_cross_entropy_reference
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer, build_stage
from model.transformer import rotary_tables

DEVICE = "cuda"
# `make test` runs everywhere, CI without a GPU included: it is to say there that these were left out.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]
BACKENDS = [name for name in get_args(AttentionName) if name not in ("auto", "math")]
HEAD_DIM = 64
WIDE = TransformerConfig(dim=2 * HEAD_DIM, layers=3, heads=2)


def backend(name: AttentionName) -> Attend:
    try:
        return choose(name, torch.device(DEVICE), torch.bfloat16, HEAD_DIM)[1]
    except UserError as error:
        pytest.skip(str(error))


def liger() -> Kernels:
    try:
        return kernels.choose("liger", torch.device(DEVICE), compiled=False)
    except UserError as error:
        pytest.skip(str(error))


def stage_of(dtype: torch.dtype = torch.float32, device: str = DEVICE, **changes: object) -> StageTransformer:
    torch.manual_seed(0)
    config = coarse_config(**{"transformer": WIDE, **changes})
    stage = build_stage(config, FIELDS, quantizers()).to(device, dtype)
    stage.configure(ExecutionConfig(compile="off"))
    return stage


def batch_of(device: str = DEVICE, **settings: object) -> dict[str, torch.Tensor]:
    return {name: codes.to(device) for name, codes in random_batch(**settings).items()}


def loss_and_gradients(stage: StageTransformer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stage.zero_grad()
    loss = stage(batch).mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad.clone() for name, value in stage.named_parameters()}}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("packing", [None, Packing((100, 1, 156))], ids=["one window", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_attention_backend_is_the_definition_in_fp64(name, kv_heads, packing):
    attend = backend(name)
    torch.manual_seed(0)
    shapes = [(1 if packing else 3, heads, 257, HEAD_DIM) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    got, expected = attend(*inputs, packing), math(*exact, packing)
    weights = torch.randn_like(expected)
    pairs = zip(
        [got, *torch.autograd.grad((got * weights).sum(), inputs)],
        [expected, *torch.autograd.grad((expected * weights).sum(), exact)],
        strict=True,
    )
    for one, other in pairs:
        assert relative_error(one, other) < 0.02  # bf16 has 8 bits


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_attends_from_the_last_of_the_keys(name, queries):
    attend = backend(name)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, steps, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for steps in (queries, 65, 65))
    assert relative_error(attend(q, k, v, None), math(q.double(), k.double(), v.double(), None)) < 0.02


@pytest.mark.parametrize("pattern", ["flat", "delay"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_packed_stage_has_the_loss_of_its_windows_one_by_one(name, pattern):
    backend(name)
    stage = stage_of(torch.bfloat16, pattern=pattern)
    stage.configure(ExecutionConfig(attention=name, compile="off"))
    windows = [batch_of(seconds=seconds, batch=1, seed=seed) for seed, seconds in enumerate((2.0, 0.7, 1.3))]
    frames = torch.tensor([window[ACOUSTIC].shape[1] for window in windows], device=DEVICE)
    apart = torch.stack([stage(window) for window in windows])
    assert torch.allclose(stage.packed(windows), (apart * frames[:, None]).sum(0) / frames.sum(), rtol=5e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_loss_is_that_of_all_logits_in_fp64(dtype, tolerance):
    torch.manual_seed(0)
    hidden = torch.randn(6000, 128, device=DEVICE, dtype=dtype)
    heads = torch.randn(3, 1024, 128, device=DEVICE, dtype=dtype) / 8
    rows = torch.stack([torch.randperm(6000)[:3500] for _ in range(3)]).to(DEVICE)
    targets = torch.randint(1024, rows.shape, device=DEVICE)
    results = []
    for function, wide in ((linear_cross_entropy, dtype), (linear_cross_entropy_reference, torch.float64)):
        inputs = [value.to(wide).requires_grad_() for value in (hidden, heads)]
        losses = function(*inputs, rows, targets)
        results.append([losses, *torch.autograd.grad((losses * losses.new_tensor([1.0, 2.0, 0.5])).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < tolerance


def test_the_fused_loss_takes_little_beside_the_gradient_of_the_hidden_states():
    torch.manual_seed(0)
    like = {"device": DEVICE, "dtype": torch.bfloat16, "requires_grad": True}
    hidden, heads = torch.randn(36_000, 1024, **like), torch.randn(3, 1024, 1024, **like)
    rows = torch.randperm(36_000, device=DEVICE).view(3, -1)
    targets = torch.randint(1024, rows.shape, device=DEVICE)
    linear_cross_entropy(hidden, heads, rows, targets).mean().backward()  # cuBLAS takes its workspace at first use
    hidden.grad = heads.grad = None
    memory = measure(lambda: linear_cross_entropy(hidden, heads, rows, targets).mean().backward(), DEVICE)
    assert memory.peak < 1.35 * hidden.numel() * hidden.element_size()


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_compiled_blocks_give_what_they_give_otherwise(recompute):
    torch._dynamo.reset()
    stage, batch = stage_of(), batch_of()
    plain = loss_and_gradients(stage, batch)
    stage.configure(ExecutionConfig(compile="on", recompute=recompute))
    for name, value in loss_and_gradients(stage, batch).items():
        assert torch.allclose(value, plain[name], atol=1e-5), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("part", ["rms_norm", "rotate", "swiglu"])
def test_ligers_kernels_are_torchs_in_fp64(part, dtype, tolerance):
    fused = liger()
    torch.manual_seed(0)
    if part == "rms_norm":
        shapes, others = [(2, 33, 384), (384,)], (1e-6,)
    elif part == "rotate":
        shapes = [(2, 4, 33, HEAD_DIM), (2, 2, 33, HEAD_DIM)]
        where = torch.device(DEVICE)
        others = (rotary_tables(tuple(map(float, range(33))), HEAD_DIM, 10_000.0, where, dtype),)
    else:
        shapes, others = [(2, 33, 384), (2, 33, 384)], ()
    values = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    results = []
    for chosen, wide in ((fused, dtype), (TORCH, torch.float64)):
        inputs = [value.to(wide, copy=True).requires_grad_() for value in values]
        # Copies, since Liger's may write into what it is given.
        made = getattr(chosen, part)(*(value.clone() for value in inputs), *others)
        made = torch.cat([value.flatten() for value in (made if part == "rotate" else (made,))])
        weights = torch.linspace(-1, 1, len(made), device=DEVICE, dtype=wide)
        results.append([made, *torch.autograd.grad((made * weights).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_stage_of_ligers_kernels_has_the_gradients_of_torchs(qk_norm, recompute):
    liger()
    stage, batch = stage_of(transformer=WIDE.model_copy(update={"qk_norm": qk_norm})), batch_of()
    stage.configure(ExecutionConfig(compile="off", kernels="torch"))
    plain = loss_and_gradients(stage, batch)
    stage.configure(ExecutionConfig(compile="off", kernels="liger", recompute=recompute))
    for name, value in loss_and_gradients(stage, batch).items():
        assert torch.allclose(value, plain[name], atol=1e-5), name


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("pattern", ["flat", "delay"])
def test_decoding_by_a_cuda_graph_makes_the_codes_of_a_cpu(pattern, cfg):
    greedy = Sampler(temperature=0, cfg=cfg)
    codes = []
    for device in ("cpu", DEVICE):
        stage = stage_of(device=device, pattern=pattern).eval()
        # 3 s with windows of 2 s: the second window starts from codes that are known
        codes.append(generate_stage(stage, batch_of(device, seconds=3.0), 3.0, greedy, [0, 1, 2]).cpu())
    assert torch.equal(*codes)
    assert codes[0].unique().numel() > 10


@pytest.mark.parametrize("library", ["torch", "deepspeed"])
def test_fused_adamw_steps_as_adamw_does(library):
    plain = stage_of()
    fused = copy.deepcopy(plain)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if library == "deepspeed":
        made = pytest.importorskip("deepspeed.ops.adam").FusedAdam(fused.parameters(), **settings)
    else:
        made = torch.optim.AdamW(fused.parameters(), fused=True, **settings)
    optimizers = [torch.optim.AdamW(plain.parameters(), foreach=False, **settings), made]
    losses = []
    for _ in range(5):
        for stage, optimizer in zip((plain, fused), optimizers, strict=True):
            losses.append(stage(batch_of()).mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
