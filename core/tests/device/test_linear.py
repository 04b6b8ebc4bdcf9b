"""Sums of products in the master's type on this machine's accelerator."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from torch.utils.checkpoint import checkpoint


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
