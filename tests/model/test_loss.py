import pytest
import torch

from model import loss
from model.loss import linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("chunk", [70, 700, 2**20], ids=["a row at a time", "ten rows", "all at once"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_the_fused_loss_is_that_of_all_logits(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    heads = torch.randn(3, 70, 16, dtype=dtype, requires_grad=True)
    rows = torch.stack([torch.randperm(50)[:31] for _ in range(3)])  # a row predicts several quantizers, or none
    targets = torch.randint(70, (3, 31))
    weights = torch.tensor([1.0, 2.0, 0.5])
    fused, plain = (
        function(hidden, heads, rows, targets) for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert torch.allclose(fused, plain, rtol=tolerance)
    for one, other in zip(
        torch.autograd.grad((fused * weights).sum(), (hidden, heads)),
        torch.autograd.grad((plain * weights).sum(), (hidden, heads)),
        strict=True,
    ):
        assert one.dtype == dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)
