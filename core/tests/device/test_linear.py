"""Sums of products in the master's type on this machine's accelerator."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("tokens", [0, 1, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_added_in_fp32(dtype, tokens):
    """A sum in the operands' type, or of a product rounded to it, would be off by a hundred times the bound."""
    torch.manual_seed(0)
    device = devices.pick()
    total, a, b = torch.randn(96, 80), torch.randn(tokens, 96).to(dtype), torch.randn(tokens, 80).to(dtype)
    want = total.double() + a.double().T @ b.double()
    flat = torch.zeros(2 * total.numel(), device=device)
    here = flat[: total.numel()].view_as(total).copy_(total)
    found = ops.accumulate_product_(here, a.to(device), b.to(device))
    assert found.data_ptr() == flat.data_ptr() and not flat[total.numel() :].any()
    assert (here.cpu().double() - want).norm() / want.norm() < 2e-5
    kind = devices.pick().type
    entries = ops.TABLE["accumulate_product_"].entries
    assert kind not in entries or not tokens or ops.accumulate_product_.serving(kind, here, a, b) in entries[kind]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_adds_its_gradient_to_the_master_type(recompute):
    torch.manual_seed(0)
    device = devices.pick()
    weight = torch.randn(48, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    total = torch.zeros(48, 64, device=device)
    ops.accumulate_gradient(weight, total)
    truth = torch.zeros(48, 64, dtype=torch.float64)
    for _ in range(8):
        x = torch.randn(33, 2, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        y = checkpoint(ops.linear, x, weight, use_reentrant=False) if recompute else ops.linear(x, weight)
        grad = torch.randn_like(y)
        y.backward(grad)
        truth += grad.flatten(0, 1).cpu().double().T @ x.detach().flatten(0, 1).cpu().double()
    assert weight.grad is None and (total.cpu().double() - truth).norm() / truth.norm() < 2e-5
