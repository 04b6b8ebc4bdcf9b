"""Adapters' updates added in the products that make them, as accelerators are served."""

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.testing.op_cases import linear, wanted
from mindspeed_model_core.testing.op_cases.case import in_types, run
from mindspeed_model_core.testing.tolerance import assert_close
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
BOUND = {torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("case", "dtype"), in_types(linear.CASES, BOUND))
def test_equals_its_formula(case, dtype) -> None:
    found = run(case, CPU, dtype, kind="cuda")
    assert found.entry is not None and found.entry.by == "PyTorch, in parts"
    assert_close(found.tensors, wanted(case, dtype), BOUND[dtype])


def test_a_product_that_is_kept_stays_as_it_was() -> None:
    torch.manual_seed(0)
    entry = ops.adapted_linear.entries["cuda"][0]
    weight, bias = torch.randn(24, 16), torch.randn(24)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((5, 2, 16), (5, 2, 6), (16, 3))]

    def run_block(x: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.keeping(entry.function, x, weight, bias, low, b, ((0, 8), (16, 8))).sin()

    plain = torch.autograd.grad(run_block(*leaves).sum(), leaves)
    again = checkpoint(run_block, *leaves, use_reentrant=False, context_fn=lambda: ops.checkpointed(ops.PRODUCTS))
    for got, want in zip(torch.autograd.grad(again.sum(), leaves), plain, strict=True):
        assert torch.equal(got, want)
