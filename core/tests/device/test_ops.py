"""Every op on this machine's accelerator against the same op in fp64 on the CPU, forward and backward."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.ops.attention import _has_flash as flash
from mindspeed_model_core.testing import op_cases
from mindspeed_model_core.testing.op_cases.case import in_types
from mindspeed_model_core.testing.recomputation import Counted
from mindspeed_model_core.testing.tolerance import assert_close, distance

BOUND = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # fp32 products may run as TF32


@pytest.fixture(autouse=True)
def compiled():
    """Let no case be served uncompiled: the types and ranks of all cases are more graphs than PyTorch keeps."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize(("case", "dtype"), in_types(op_cases.CASES, BOUND))
def test_every_op_equals_its_formula(case, dtype, record_property):
    device, want = devices.pick(), op_cases.wanted(case, dtype)
    for level in (0, 2):
        with ops.at_level(level):
            found = op_cases.run(case, device, dtype)
        far = {name: distance(found.tensors[name], tensor) for name, tensor in want.items()}
        by = "reference" if found.entry is None else found.entry.by
        record_property("found", (f"{case.op.name} {str(dtype).removeprefix('torch.')}", by, max(far.values())))
        assert_close(found.tensors, want, BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", op_cases.CHECKS)
def test_every_op_of_its_own_kind_equals_its_formula(name, level, dtype):
    with ops.at_level(level):
        op_cases.CHECKS[name](devices.pick(), dtype, BOUND[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs that walk over rows are CUDA's")
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("shape", "affine"), [((6000, 1280), (1280,)), ((3000, 3, 1280), (3, 1280)), ((999, 4096), None)]
)
def test_norms_of_more_rows_than_programs_equal_their_formulas(shape, affine, dtype):
    torch.manual_seed(0)
    device = devices.pick()
    operands = [torch.randn(s, dtype=dtype) for s in (shape, affine, affine) if s is not None]
    grad, found = torch.randn(shape, dtype=dtype), []
    for where, wide in ((device, dtype), (torch.device("cpu"), torch.float64)):
        xs = x, *rest = [y.to(where, wide).requires_grad_() for y in operands]
        scale, shift = rest or (None, None)
        with ops.at_level(2 if wide == dtype else 0):
            y = ops.adaln(x, shift, scale, 1e-5) if len(shape) == 3 else ops.layer_norm(x, scale, shift, 1e-5)
        tensors = (y, *torch.autograd.grad(y, xs, grad.to(where, wide)))
        found.append({str(n): tensor.detach().cpu().double() for n, tensor in enumerate(tensors)})
    assert_close(*found, BOUND[dtype])


@pytest.mark.skipif(flash(), reason="flash-attn-4 is installed, and serves this GPU")
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


@pytest.mark.skipif(not flash(), reason="needs flash-attn-4 and a Hopper")
@pytest.mark.parametrize("lengths", [(1024,), (1, 300, 7, 716)])
@pytest.mark.parametrize("window", [None, (64, 0)])
def test_flash_attention_4_serves_a_hopper_within_a_compiled_block_too(lengths, window):
    def block(x, lengths):
        q, k, v = (x * 2).split((8, 2, 2), 1)
        out = ops.attention(q, k, v, lengths, window=window)
        return out + ops.full_attention(*(y[:, None] for y in (q, k, v)))[:, 0]

    torch.manual_seed(0)
    x = torch.randn(1024, 12, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with Counted() as counted:
        block(x, lengths)
    assert counted.calls == 2 * ["mindspeed_model::flash_attention"]
    plain = block(x, lengths)
    whole = torch.compile(block, fullgraph=True)(x, lengths)
    want = block(x.detach().cpu().double().requires_grad_(), lengths)
    for out in (plain, whole):
        assert_close({"out": out.detach().cpu().double()}, {"out": want.detach()}, BOUND[x.dtype])
    one, two = (torch.autograd.grad(out.sum(), x)[0].cpu().double() for out in (plain, whole))
    assert_close({"gradient": two}, {"gradient": one}, BOUND[x.dtype])
