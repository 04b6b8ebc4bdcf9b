"""Every op on this machine's accelerator against the same op in fp64 on the CPU, forward and backward."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.testing import op_cases
from mindspeed_model_core.testing.op_cases.case import in_types

BOUND = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # fp32 products may run as TF32


def check(function, inputs, dtype):
    """Compare value and gradients; differences as a share of the largest wanted value."""
    device = devices.pick()
    exact = [x.double().requires_grad_() for x in inputs]
    here = [x.to(device, dtype).requires_grad_() for x in inputs]
    want, got = function(*exact), function(*here)
    weight = torch.randn(want.shape, dtype=torch.float64)
    pairs = [(got, want)]
    grads = torch.autograd.grad((got * weight.to(device, got.dtype)).sum(), here)
    pairs += zip(grads, torch.autograd.grad((want * weight).sum(), exact), strict=True)
    for a, b in pairs:
        far = (a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max()
        assert far < BOUND[dtype], float(far)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("lengths", [(256,), (64, 64), (100, 1, 33, 66)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(dtype, width, heads, kv, lengths, causal):
    torch.manual_seed(0)
    tokens = sum(lengths)
    inputs = [torch.randn(tokens, h, width) for h in (heads, kv, kv)]
    check(lambda q, k, v: ops.attention(q, k, v, lengths, causal=causal), inputs, dtype)


@pytest.mark.parametrize(("case", "dtype"), in_types(op_cases.CASES, BOUND))
def test_every_op_equals_its_formula(case, dtype):
    for level in (0, 2):
        with ops.at_level(level):
            op_cases.check(case, devices.pick(), dtype, BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
def test_the_rest(dtype):
    torch.manual_seed(0)
    x = torch.randn(70, 96)
    heads, positions = torch.randn(70, 3, 32), torch.arange(70)
    check(lambda h: ops.rope(h, *ops.rope_tables(positions.to(h.device), 32, 1e4)), [heads], dtype)
    labels = torch.randint(96, (70,))
    labels[::7] = -100
    check(lambda x: ops.cross_entropy(x, labels.to(x.device)), [x], dtype)
