"""Holds what Triton serves on CUDA against the formulas, by Triton's interpreter; prints what it has held.

Run with TRITON_INTERPRET=1.
"""

from typing import Any

import torch
from mindspeed_model_core import ops
from mindspeed_model_core.ops import kernels
from mindspeed_model_core.testing.op_cases import CASES, CHECKS, linear, run, wanted
from mindspeed_model_core.testing.op_cases.case import draw, serving
from mindspeed_model_core.testing.tolerance import assert_close
from triton.runtime import interpreter

CPU = torch.device("cpu")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
AFTER_STEPS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Bounds of weights and moments after AdamW's steps: the interpreter cuts to bf16 where a GPU rounds."""
SERVED = ("adaln", "add_layer_norm", "layer_norm", "swiglu")
COMPILED = ("add_layer_norm-spread residual",)
"""Cases of these that the compiler serves."""
MULTIPROCESSORS = 3  # few, so that programs walk over several parts
WIDE = 10_000  # what is wider takes the interpreter half a minute
_patch = interpreter._patch_lang_tensor


def _patch_bounds(tensor: Any, scope: Any) -> None:
    """Let loops have bounds that are no constants: of one element's array, NumPy from 2.4 on makes no int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def main() -> None:
    """Run all cases."""
    interpreter._patch_lang_tensor = _patch_bounds
    kernels._multiprocessors = lambda device: MULTIPROCESSORS
    for dtype, bound in BOUND.items():
        for case in CASES:
            if case.op.name in SERVED and case.operands[0].numel() and str(case) not in COMPILED:
                entry = serving(case, "cuda", dtype)
                assert entry is not None and entry.calls == ("triton",), case
                assert_close(run(case, CPU, dtype, kind="cuda").tensors, wanted(case, dtype), bound)
                print(case)
    for rows, width in linear.ROWS:
        if rows and width < WIDE:
            x = draw(rows, width).bfloat16()
            found, want = kernels.sum_rows(x), x.double().sum(0)
            assert_close({"sum_rows": found.double()}, {"sum_rows": want}, BOUND[x.dtype])
            print(f"sum_rows-{rows}x{width}")
    # Far from zero, where rounding shows; the interpreter rounds to fp16 as devices do, but cuts bf16 off.
    operands = draw(70, 96) + 256, draw(70, 96, seed=1), draw(96), draw(96, seed=1)
    x, residual, weight, bias = (y.half() for y in operands)
    normed, total, _ = kernels.layer_norm(x, weight, bias, 1e-5, 0.0, residual)
    assert torch.equal(total, x + residual), "the sum is rounded as PyTorch's"
    assert torch.equal(normed, kernels.layer_norm(total, weight, bias, 1e-5, 0.0)[0]), "what is normed is rounded"
    ops.adamw_.entries["cpu"] = ops.adamw_.entries["cuda"]
    for dtype, bound in AFTER_STEPS.items():
        CHECKS["adamw_"](CPU, dtype, bound)
        print(f"adamw_-{dtype}")


if __name__ == "__main__":
    main()
