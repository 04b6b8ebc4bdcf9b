"""Every op on this machine's accelerator against the same op in fp64 on the CPU, forward and backward."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.testing import op_cases
from mindspeed_model_core.testing.op_cases.attention import CHUNKS, check_ring
from mindspeed_model_core.testing.op_cases.case import in_types
from mindspeed_model_core.testing.recomputation import Counted

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN is CUDA's")
def test_pytorch_takes_cudnn_where_it_is_best():
    """Nearly twice as fast as the flash backend on Hopper, and PyTorch's first choice from cuDNN 9.15.1 on."""
    version = torch.backends.cudnn.version() or 0
    if torch.cuda.get_device_capability() != (9, 0) or version < 91501:
        pytest.skip(f"cuDNN {version} on {torch.cuda.get_device_name()}: for Hopper, from 9.15.1 on")
    q, k = (torch.randn(512, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
    with Counted() as counted:
        ops.attention(q, k, k, (256, 256))
        ops.attention(q, q, q, (512,), causal=False)
        ops.full_attention(q[:, None], q[:, None], q[:, None])
    assert counted.calls == 3 * ["aten::_scaled_dot_product_cudnn_attention"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_of_a_ring_make_whole_attention(name, dtype, causal):
    check_ring(name, devices.pick(), dtype, BOUND[dtype], causal)


@pytest.mark.parametrize("dtype", BOUND)
def test_the_rest(dtype):
    torch.manual_seed(0)
    x = torch.randn(70, 96)
    heads, positions = torch.randn(70, 3, 32), torch.arange(70)
    check(lambda h: ops.rope(h, *ops.rope_tables(positions.to(h.device), 32, 1e4)), [heads], dtype)
    labels = torch.randint(96, (70,))
    labels[::7] = -100
    check(lambda x: ops.cross_entropy(x, labels.to(x.device)), [x], dtype)
