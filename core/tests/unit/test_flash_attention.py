"""FlashAttention-4 as an entry of the table: what is asked of it, with its kernels' formulas in place of them."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.testing import op_cases
from mindspeed_model_core.testing.op_cases.case import check
from mindspeed_model_core.testing.recomputation import LENGTHS, check_kept
from mindspeed_model_core.testing.tolerance import assert_close
from torch import Tensor

CPU = torch.device("cpu")
module = importlib.import_module("mindspeed_model_core.ops.attention")
OPS = (ops.attention, ops.full_attention)
CASES = [
    case
    for case in op_cases.CASES
    if case.op in OPS and min(x.numel() for x in case.operands) and case.operands[0].shape[-1] % 32 == 0
]


def _documents(ends: Tensor | None, *xs: Tensor) -> Any:
    """Return each document's ``[heads, tokens, width]``, for operands as the library takes them."""
    if ends is None:
        return zip(*(x.transpose(1, 2) for x in xs), strict=True)
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(xs[0])
    cuts = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    return zip(*([x[cut].transpose(0, 1) for cut in cuts] for x in xs), strict=True)


def _scores(q: Tensor, k: Tensor, how: dict[str, Any]) -> Tensor:
    if how["causal"]:
        assert how["window_size_left"] is how["window_size_right"] is None
        band = module.CAUSAL
    else:
        band = tuple(-1 if reach is None else reach for reach in (how["window_size_left"], how["window_size_right"]))
    assert band == module.ALL or q.shape[1] == k.shape[1]
    return module.scores(q[None], k[None], module.hidden(q.shape[1], band, q.device))


def _joined(ends: Tensor | None, parts: list[Tensor]) -> Tensor:
    if ends is None:
        return torch.stack(parts).transpose(1, 2).contiguous()
    return torch.cat(parts, 1).transpose(0, 1).contiguous()


def _check(how: dict[str, Any]) -> Tensor | None:
    ends = how.get("cu_seqlens_q")
    if ends is not None:
        assert ends is how["cu_seqlens_k"]
        assert how["max_seqlen_q"] == how["max_seqlen_k"] == int(ends.diff().max())
    return ends


def _forward(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **how: Any) -> tuple[Any, ...]:
    assert return_lse
    ends, outs, lses = _check(how), [], []
    for a, b, c in _documents(ends, q, k, v):
        found, heads = _scores(a, b, how), q.shape[-2]
        outs.append(module.unfold(found.softmax(-1) @ c[None].float(), heads)[0])
        lses.append(module.unfold(found.logsumexp(-1), heads)[0])
    lse = torch.stack(lses) if ends is None else torch.cat(lses, 1)
    return _joined(ends, outs).to(q.dtype), lse, None, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    deterministic: bool,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    ends, parts = _check(how), []
    each_lse = lse.unbind() if ends is None else [lse[:, a:b] for a, b in itertools.pairwise(ends.tolist())]
    for (a, b, c, o, g), one in zip(_documents(ends, q, k, v, out, grad), each_lse, strict=True):
        kv_heads, heads = len(b), len(a)
        a, o, g, one = (module.fold(x[None].float(), kv_heads) for x in (a, o, g, one))
        weights = (_scores(module.unfold(a, heads)[0], b, how) - one[..., None]).exp()
        slope = weights * (g @ c[None].float().mT - (g * o).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        parts.append((module.unfold(slope @ b[None].float(), heads)[0], (slope.mT @ a)[0], (weights.mT @ g)[0]))
    for made, found in zip((dq, dk, dv), zip(*parts, strict=True), strict=True):
        made.copy_(_joined(ends, list(found)))
    return dq, dk, dv


@pytest.fixture
def flash(monkeypatch) -> None:
    """Let the entries of CUDA serve the CPU, and the library be its formulas."""
    stand_in = SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    monkeypatch.setattr(module, "_flash", lambda: stand_in)
    monkeypatch.setattr(module, "KEYS", 1)
    for op in OPS:
        monkeypatch.setitem(op.entries, "cpu", op.entries["cuda"])


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_asked_for_what_the_op_means(case) -> None:
    found = check(case, CPU, torch.bfloat16, 2e-2)
    assert found.entry is not None and found.entry.calls == ("flash_attn.cute",)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(
    ("dtype", "tokens", "width", "taken"),
    [
        (torch.bfloat16, 3, 32, True),
        (torch.float16, 3, 256, True),
        (torch.bfloat16, 3, 288, False),
        (torch.bfloat16, 3, 80, False),
        (torch.float32, 3, 32, False),
        (torch.bfloat16, 0, 32, False),
    ],
)
def test_it_serves_what_it_takes_backward_too(dtype, tokens, width, taken) -> None:
    q = torch.empty(tokens, 2, width, dtype=dtype)
    for entry in (
        ops.attention.serving("cuda", q, q, q, (tokens,)),
        ops.full_attention.serving("cuda", *[q[None]] * 3),
    ):
        assert (entry is not None and entry.calls == ("flash_attn.cute",)) == taken


@pytest.mark.parametrize(
    ("capability", "installed"), [((9, 0), True), ((9, 0), False), ((8, 0), True), ((10, 0), True)]
)
def test_it_serves_hoppers_where_it_is_installed(monkeypatch, capability, installed) -> None:
    library = SimpleNamespace(interface=object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=library))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", library if installed else None)
    served = module._flash.__wrapped__() is library.interface
    assert served == (installed and capability == (9, 0))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("documents", LENGTHS)
def test_its_result_can_be_kept(documents) -> None:
    check_kept(documents, CPU, torch.bfloat16)


@pytest.mark.usefixtures("flash")
def test_deterministic_runs_ask_for_deterministic_gradients() -> None:
    q = torch.randn(5, 1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        ops.full_attention(q, q, q).sum().backward()  # the stand-in looks
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("flash")
def test_the_operator_is_what_pytorch_expects() -> None:
    torch.manual_seed(0)
    dense = [torch.randn(2, 5, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    packed = [x.detach()[0].requires_grad_() for x in dense]
    for operands in ((*dense, None, 0, -1, -1), (*packed, torch.tensor([0, 2, 5], dtype=torch.int32), 3, -1, 0)):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(module.flash_attention, operands, test_utils=tests)


@pytest.mark.usefixtures("flash")
def test_a_compiled_block_takes_the_operator_as_it_is(monkeypatch) -> None:
    def block(x: Tensor) -> Tensor:
        q, k, v = (x * 2).chunk(3, -1)
        return ops.full_attention(q, k, v) + ops.attention(*(y[:, 0] for y in (q, k, v)), (3, 3))[:, None]

    calls: list[str] = []
    forward = module._flash()._flash_attn_fwd

    def counted(*args: Any, **how: Any) -> Any:
        calls.append("dense" if how.get("cu_seqlens_q") is None else "packed")
        return forward(*args, **how)

    monkeypatch.setattr(module._flash(), "_flash_attn_fwd", counted)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    x = torch.randn(6, 1, 2, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        made = {}
        for name, run in (("plain", block), ("compiled", compiled)):
            calls.clear()
            out = run(x)
            assert calls == ["dense", "dense"]
            made[name] = {"out": out.detach(), "grad": torch.autograd.grad(out.sum(), x)[0]}
    assert_close(made["compiled"], made["plain"], 1e-2)
