"""The references are right, in values and gradients, and wrong calls of torch_npu's operators are refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mindspeed_model_core.testing import npu_emulator
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator
from mindspeed_model_core.testing.tolerance import assert_close
from torch import Tensor

pytestmark = [pytest.mark.npu, needs_emulator]
ops: Any = torch.ops.npu
NPU = torch.device("npu:0" if npu_emulator.installed() else "cpu")  # without torch_npu torch does not know the name


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def gradients(function: Callable[..., Tensor], operands: list[Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a function's value and the gradient of each operand, for one output gradient."""
    here = [x.to(device).requires_grad_(x.is_floating_point()) for x in operands]
    out = function(*here)
    out.backward(draw(*out.shape, seed=9).to(device, out.dtype))
    found = {"value": out.detach().cpu()}
    for number, x in enumerate(here):
        if x.grad is not None:
            found[str(number)] = x.grad.cpu()
    return found


def compare(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], *operands: Tensor, tolerance: float = 2e-5
) -> None:
    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return gradients(fused, list(operands), NPU), gradients(plain, list(operands), torch.device("cpu"))

    got, want = run_on("npu", run, 1)[0]
    assert len(want) > 1
    assert_close(got, want, tolerance)


def called(names: set[str]) -> bool:
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    return names <= {call.name for call in CALLS}


# --- references


def test_rms_norm_and_its_derivative() -> None:
    def fused(x: Tensor, g: Tensor) -> Tensor:
        out = ops.npu_rms_norm(x, g, epsilon=1e-5)[0]
        assert called({"npu_rms_norm"})
        return out

    compare(fused, lambda x, g: F.rms_norm(x, (8,), g, 1e-5), draw(3, 5, 8), draw(8))


@pytest.mark.parametrize("asked", ["both", "normed", "sum"])
def test_add_layer_norm_and_its_derivative(asked: str) -> None:
    """Of what is returned, a gradient may come from the normed, the sum, or both."""

    def pick(normed: Tensor, total: Tensor) -> Tensor:
        return {"both": torch.cat((normed, total)), "normed": normed, "sum": total}[asked]

    def fused(x: Tensor, y: Tensor, g: Tensor, b: Tensor) -> Tensor:
        normed, _, _, total = ops.npu_add_layer_norm(x, y, g, b, 1e-3, True)
        return pick(normed, total)

    def plain(x: Tensor, y: Tensor, g: Tensor, b: Tensor) -> Tensor:
        # With nothing left of the norm, the kernel still gives its parameters a gradient of zero.
        return pick(F.layer_norm(x + y, (8,), g, b, 1e-3), x + y + 0 * (g + b))

    compare(fused, plain, draw(3, 5, 8), draw(3, 5, 8, seed=1), draw(8), draw(8, seed=1))


def test_swiglu_and_its_derivative() -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    compare(lambda x: ops.npu_swiglu(x, dim=-1), plain, draw(3, 5, 12))


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_and_its_derivative(mode: str) -> None:
    def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1) if mode == "half" else (x[..., ::2], x[..., 1::2])
        turned = torch.cat((-b, a), -1) if mode == "half" else torch.stack((-b, a), -1).flatten(-2)
        return x * cos + turned * sin

    def fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.npu_rotary_mul(x, cos, sin, mode)

    compare(fused, plain, draw(2, 3, 5, 8), draw(1, 1, 5, 8), draw(1, 1, 5, 8, seed=1))


def upper() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
    """Attention of ``[batch, heads, tokens, width]`` with a scale that is not the usual one."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * 0.3
    return (scores if blocked is None else scores.masked_fill(blocked, float("-inf"))).softmax(-1) @ v


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "BNSD": (lambda x: x, lambda x, n: x),
    "BSND": (lambda x: x.transpose(1, 2), lambda x, n: x.transpose(1, 2)),
    "BSH": (lambda x: x.transpose(1, 2).flatten(2), lambda x, n: x.unflatten(2, (n, -1)).transpose(1, 2)),
    "SBH": (lambda x: x.permute(2, 0, 1, 3).flatten(2), lambda x, n: x.unflatten(2, (n, -1)).permute(1, 2, 0, 3)),
}
MODES: dict[str, tuple[dict[str, int], Callable[[Tensor, Tensor], Tensor] | None]] = {
    "full": ({}, None),
    "upper-left": ({"sparse_mode": 2}, lambda i, j: j > i),
    "lower-right": ({"sparse_mode": 3}, lambda i, j: j > i + 3),
    "band": ({"sparse_mode": 4, "pre": 2, "next": 1}, lambda i, j: (j > i + 3 + 1) | (j < i + 3 - 2)),
}


COMBINED = [(*pair, "") for pair in itertools.product(MODES, LAYOUTS)]
# The versions share all but their names.
COMBINED += itertools.product(["band", "lower-right"], ["BNSD", "SBH"], ["_v2", "_v3"])


@pytest.mark.parametrize(("mode", "layout", "version"), COMBINED)
def test_attention_and_its_derivative(mode: str, layout: str, version: str) -> None:
    """Four query heads share two for keys; seven keys for four queries, so that the corners differ."""
    inward, outward = LAYOUTS[layout]
    fields, rule = MODES[mode]
    band = {
        f"{name}_{'tokens' if version == '_v2' else 'tockens'}": fields[name]
        for name in ("pre", "next")
        if name in fields
    }
    blocked = None if rule is None else rule(torch.arange(4)[:, None], torch.arange(7))

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = getattr(ops, f"npu_fusion_attention{version}")
        mask = None if rule is None else upper()
        operands = (inward(x).contiguous() for x in (q, k, v))
        how = {"scale": 0.3, "atten_mask": mask, "sparse_mode": fields.get("sparse_mode", 0), **band}
        return outward(function(*operands, 4, layout, **how)[0], 4)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, blocked)

    compare(fused, plain, draw(2, 4, 4, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8, seed=1))


@pytest.mark.parametrize("order", ["", "TND"])
def test_attention_of_packed_sequences(order: str) -> None:
    """Sequences of 3, 0 and 5 tokens; the statistics are in either order."""
    ends = [3, 3, 8]

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        how = {"scale": 0.3, "atten_mask": upper(), "sparse_mode": 3, "softmax_layout": order, **lengths}
        return ops.npu_fusion_attention(q, k, v, 4, "TND", **how)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for part in (slice(0, 3), slice(3, 8)):
            a, b, c = (x[part].transpose(0, 1)[None] for x in (q, k, v))
            length = a.shape[2]
            parts.append(
                plain_attention(a, b, c, torch.ones(length, length, dtype=torch.bool).triu(1))[0].transpose(0, 1)
            )
        return torch.cat(parts)

    compare(fused, plain, draw(8, 4, 8), draw(8, 2, 8), draw(8, 2, 8, seed=1))


def test_scaled_dot_product_attention_is_the_fused_one() -> None:
    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert called({"npu_fusion_attention_v3"})
        return out

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    compare(fused, plain, *(draw(2, 4, 6, 8, seed=s) for s in (0, 1, 2)))


@pytest.mark.parametrize("layout", ["SBH", "TND"])
def test_ring_update_joins_two_parts_of_the_keys(layout: str) -> None:
    def run() -> Tensor:
        q, k, v = (draw(6, 2, 4, 8, seed=s).to(NPU) for s in (0, 1, 2))  # tokens, batch, heads, width
        if layout == "SBH":
            a, b = ((q.flatten(2), x[:3].flatten(2), y[:3].flatten(2)) for x, y in ((k, v), (k[3:], v[3:])))
            one, two = (ops.npu_fusion_attention(*x, 4, "SBH", scale=0.3)[:3] for x in (a, b))
            out = ops.npu_ring_attention_update(*one, *two, input_layout="SBH")[0]
            return out.unflatten(2, (4, 8)).cpu()
        ends = [[6], [3]]
        q, k, v = q[:, 0].contiguous(), k[:, 0].contiguous(), v[:, 0].contiguous()
        parts = [
            ops.npu_fusion_attention(
                q, k[at], v[at], 4, "TND", scale=0.3, actual_seq_qlen=ends[0], actual_seq_kvlen=ends[1]
            )[:3]
            for at in (slice(0, 3), slice(3, 6))
        ]
        starts = torch.tensor([0, 6], device=NPU)
        return ops.npu_ring_attention_update(*parts[0], *parts[1], actual_seq_qlen=starts, input_layout="TND")[0].cpu()

    q, k, v = (draw(6, 2, 4, 8, seed=s).permute(1, 2, 0, 3) for s in (0, 1, 2))
    want = plain_attention(q, k, v).permute(2, 0, 1, 3)
    assert_close({"out": run_on("npu", run, 1)[0]}, {"out": want if layout == "SBH" else want[:, 0]}, 2e-5)


def test_grouped_matmul_and_the_weights_gradient() -> None:
    x, w, ends = draw(7, 4), draw(3, 4, 5), [2, 2, 7]

    def run() -> tuple[Tensor, Tensor, Tensor]:
        a, b, g = x.to(NPU), w.to(NPU), torch.tensor(ends, device=NPU)
        y = ops.npu_grouped_matmul([a], [b], group_list=g, split_item=3, group_type=0)[0]
        sizes = torch.tensor([2, 0, 5], device=NPU)
        again = ops.npu_grouped_matmul([a], [b], group_list=sizes, split_item=3, group_type=0, group_list_type=1)[0]
        dw = ops.npu_grouped_matmul([a.T], [y], group_list=g, split_item=3, group_type=2)[0]
        return y.cpu(), again.cpu(), dw.cpu()

    y, again, dw = run_on("npu", run, 1)[0]
    want = torch.cat([x[:2] @ w[0], x[2:] @ w[2]])
    assert_close({"y": y, "again": again}, {"y": want, "again": want}, 2e-5)
    assert_close({"dw": dw}, {"dw": torch.stack([x[:2].T @ want[:2], torch.zeros(4, 5), x[2:].T @ want[2:]])}, 2e-5)


def test_tokens_go_to_their_experts_and_back_with_gradients() -> None:
    experts = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])

    def fused(tokens: Tensor, weights: Tensor) -> Tensor:
        rows, places = ops.npu_moe_token_permute(tokens, experts.to(NPU))
        return ops.npu_moe_token_unpermute(rows * (1 + torch.arange(8, device=NPU)[:, None]), places, probs=weights)

    def plain(tokens: Tensor, weights: Tensor) -> Tensor:
        order = experts.flatten().argsort(stable=True)
        factor = torch.empty(8)
        factor[order] = 1 + torch.arange(8.0)
        return (tokens[:, None] * factor.view(4, 2, 1) * weights[..., None]).sum(1)

    compare(fused, plain, draw(4, 6), draw(4, 2))


def test_adam_is_pytorchs() -> None:
    def run() -> tuple[Tensor, Tensor]:
        weight, first, second = draw(5, 3).to(NPU), torch.zeros(5, 3, device=NPU), torch.zeros(5, 3, device=NPU)
        parameter = torch.nn.Parameter(draw(5, 3))
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(3):
            parameter.grad = draw(5, 3, seed=step + 1)
            optimizer.step()
            powers = 0.9**step, 0.95**step
            how = (*powers, 1e-2, 0.1, 0.9, 0.95, 1e-8, parameter.grad.to(NPU), None, False, False)
            ops.npu_apply_adam_w.out(*how, out=[weight, first, second])
        return weight.cpu(), parameter.detach()

    got, want = run_on("npu", run, 1)[0]
    assert_close({"weight": got}, {"weight": want}, 2e-5)


def test_products_fused_with_collectives_are_both_in_turn() -> None:
    import torch.distributed as dist

    def run() -> dict[str, Tensor]:
        rank = dist.get_rank()
        device = torch.device("npu", rank)
        name = dist.group.WORLD._get_backend(device).get_hccl_comm_name(rank)  # type: ignore[union-attr]
        x, w = (draw(*s, seed=rank, dtype=torch.bfloat16).to(device) for s in ((4, 256), (256, 6)))
        product = x @ w
        summed = product.clone()
        dist.all_reduce(summed)
        rows = x.new_empty(8, 256)
        dist.all_gather_into_tensor(rows, x)
        both, gathered = ops.npu_all_gather_base_mm(x, w, name, 2)
        return {
            "all_reduce": (ops.npu_mm_all_reduce_base(x, w, name) - summed).cpu(),
            "reduce_scatter": (ops.npu_mm_reduce_scatter_base(x, w, name, 2) - summed.chunk(2)[rank]).cpu(),
            "gathered": (gathered - rows).cpu(),
            "all_gather": (both - rows @ w).cpu(),
            "something": summed.abs().sum().cpu(),
        }

    for found in run_on("npu", run, 2):
        assert found.pop("something") > 0
        assert all(bool((difference == 0).all()) for difference in found.values()), found


# --- what is refused


def half(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, device=NPU)


def single(*shape: int) -> Tensor:
    return torch.ones(shape, device=NPU)


def attend(*shapes: tuple[int, ...], heads: int = 4, layout: str = "BNSD", **fields: Any) -> Any:
    q, k, v = (half(*s) for s in shapes)
    return ops.npu_fusion_attention(q, k, v, heads, layout, **fields)


def packed(**fields: Any) -> Any:
    return attend((6, 4, 8), (6, 4, 8), (6, 4, 8), layout="TND", **fields)


def grouped(
    groups: Tensor, x: Tensor | None = None, depth: int = 8, weights: int = 2, width: int = 8, kind: int = 0
) -> Any:
    x = half(4, 8) if x is None else x
    how = {"group_list": groups, "split_item": 3, "group_type": 0, "group_list_type": kind}
    return ops.npu_grouped_matmul([x], [half(weights, depth, width)], **how)


def groups(*ends: int) -> Tensor:
    return torch.tensor(ends, device=NPU)


def attend_back(statistics: Tensor) -> Any:
    how = {"softmax_max": statistics, "softmax_sum": statistics, "attention_in": half(*Q)}
    return ops.npu_fusion_attention_grad(*(half(*Q) for _ in range(4)), 4, "BNSD", **how)


def added(total: Tensor, x: Tensor | None = None, ends: Tensor | None = None) -> Any:
    ends = groups(4) if ends is None else ends
    return ops.npu_grouped_matmul_add_(total, half(4, 8) if x is None else x, half(4, 8), ends)


def rotate(*shapes: tuple[int, ...], mode: str = "half") -> Any:
    return ops.npu_rotary_mul(*(half(*s) for s in shapes), mode)


def adam(first: Tensor) -> Any:
    how = (0.9, 0.9, 1e-3, 0.0, 0.9, 0.9, 1e-8, single(3), None, False, False)
    return ops.npu_apply_adam_w.out(*how, out=[single(3), first, first])


def double(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64, device=NPU)


Q, COS = (1, 4, 6, 8), (1, 1, 5, 8)
SAME = (Q, Q, Q)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a scale of another width": (lambda: ops.npu_rms_norm(half(2, 8), half(4)), "gamma"),
    "a norm in fp64": (lambda: ops.npu_rms_norm(double(2, 8), double(8)), "fp32, not|dtype"),
    "a residual of another shape": (lambda: ops.npu_add_rms_norm(half(2, 8), half(1, 8), half(8)), "shape"),
    "a shift unlike the scale": (lambda: ops.npu_add_layer_norm(half(2, 8), half(2, 8), half(8), half(1)), "one shape"),
    "a scale of another end": (lambda: ops.npu_add_layer_norm(half(2, 8), half(2, 8), half(2), half(2)), "the end"),
    "a sum of two types": (lambda: ops.npu_add_layer_norm(half(2, 8), single(2, 8), half(8), half(8)), "type"),
    "a sum in fp64": (lambda: ops.npu_add_layer_norm(*[double(2, 8)] * 2, *[double(8)] * 2), "fp32, not|dtype"),
    "an odd width": (lambda: ops.npu_swiglu(half(2, 7)), "is even|divi"),
    "cos that does not spread": (lambda: rotate((2, 3, 5, 8), (1, 1, 4, 8), (1, 1, 4, 8)), "spreads|shape"),
    "cos unlike sin": (lambda: rotate((2, 3, 5, 8), COS, (1, 1, 1, 8)), "shape"),
    "cos of another type": (lambda: ops.npu_rotary_mul(half(2, 3, 5, 8), single(*COS), single(*COS)), "of one type"),
    "a thousand heads": (lambda: rotate((1, 3, 1000, 8), (1, 3, 1, 8), (1, 3, 1, 8)), "below 1000 each"),
    "a thousand heads in all": (
        lambda: rotate((1, 25, 40, 8), (1, 1, 1, 8), (1, 1, 1, 8), mode="interleave"),
        "below 1000 when",
    ),
    "tables by sample": (
        lambda: rotate((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 1, 8), mode="interleave"),
        "between tokens alone",
    ),
    "an unknown rotary mode": (lambda: rotate((2, 3, 5, 8), COS, COS, mode="third"), "mode"),
    "an unknown layout": (lambda: attend(*SAME, layout="BDSN"), "layout"),
    "heads that are not q's": (lambda: attend(*SAME, heads=2), "head_num=2"),
    "four dims called BSH": (lambda: attend(*SAME, layout="BSH"), "dim"),
    "k wider than q": (lambda: attend(Q, (1, 4, 6, 16), (1, 4, 6, 16)), "wide|shape"),
    "types that differ": (
        lambda: ops.npu_fusion_attention(half(*Q), single(*Q), half(*Q), 4, "BNSD"),
        "all fp16|dtype",
    ),
    "kv heads that do not divide": (lambda: attend(Q, (1, 3, 6, 8), (1, 3, 6, 8)), "share"),
    "a float mask": (lambda: attend(*SAME, atten_mask=half(6, 6)), "bool"),
    "a mask that ends early": (lambda: attend(*SAME, atten_mask=half(4, 4).bool()), "every q and k"),
    "a compressed mask without its mode": (lambda: attend(*SAME, atten_mask=upper()), "every q and k"),
    "statistics kept once": (lambda: attend_back(single(1, 4, 6, 1)), "8 times"),
    "a mode without its mask": (lambda: attend(*SAME, sparse_mode=3), "needs atten_mask"),
    "a mode with a small mask": (lambda: attend(*SAME, sparse_mode=2, atten_mask=half(6, 6).bool()), "2048"),
    "the lower triangle": (lambda: attend(*SAME, sparse_mode=2, atten_mask=~upper()), "upper triangle"),
    "a mode that there is not": (lambda: attend(*SAME, sparse_mode=9, atten_mask=upper()), "sparse"),
    "packed without lengths": (lambda: packed(), "seq"),
    "lengths instead of ends": (lambda: packed(actual_seq_qlen=[4, 2], actual_seq_kvlen=[4, 2]), "in order"),
    "too many sequences": (
        lambda: packed(actual_seq_qlen=[0] * 1024 + [6], actual_seq_kvlen=[0] * 1024 + [6]),
        "1025 sequences",
    ),
    "groups in int32": (lambda: grouped(groups(2, 4).int()), "int64|Int"),
    "groups beyond the rows": (lambda: grouped(groups(2, 5)), "within 4 rows"),
    "weights of another depth": (lambda: grouped(groups(2, 4), depth=6), "K agrees|K"),
    "fewer groups than weights": (lambda: grouped(groups(4)), "1 groups for 2"),
    "one group by its size": (lambda: grouped(groups(4), weights=1, kind=1), "more than one"),
    "a weight too wide": (lambda: grouped(groups(2, 4), width=65536), "below 65536"),
    "experts for other tokens": (lambda: ops.npu_moe_token_permute(half(4, 8), groups(0, 1, 0)), "one row"),
    "an unknown communicator": (lambda: ops.npu_mm_all_reduce_base(half(4, 8), half(8, 8), "nobody"), "names an open"),
    "an empty product to sum over ranks": (
        lambda: ops.npu_mm_all_reduce_base(half(0, 8), half(8, 8), "x"),
        "empty|dim",
    ),
    "a sum in bf16": (lambda: added(half(1, 8, 8)), "fp32|[Dd]type|dtype"),
    "a sum of another shape": (lambda: added(single(1, 8, 4)), "groups, M, N|shape|dim"),
    "operands as wide as 65536": (lambda: added(single(1, 65536, 8), half(4, 65536)), "below 65536"),
    "groups of a sum in int32": (lambda: added(single(1, 8, 8), ends=groups(4).int()), "int64"),
    "moments of another type": (lambda: adam(half(3)), "type"),
    "a product in fp64": (lambda: double(2, 2) @ double(2, 2), "float64"),
    "dropout within attention": (lambda: attend(*SAME, keep_prob=0.9), "does not know keep_prob"),
    "an operator without a reference": (lambda: ops.npu_clipped_swiglu(half(2, 8)), "no reference"),
    "a lost gradient": (lambda: grouped(groups(2, 4), half(4, 8).requires_grad_()), "gradient would be lost"),
    "more memory than there is": (lambda: torch.empty(2**40, device=NPU), "out of memory"),
    "a device that there is not": (lambda: torch.ones(2, device="npu:7"), "device"),
}


def test_wrong_calls_are_refused_with_their_reason() -> None:
    def run() -> dict[str, str | None]:
        said: dict[str, str | None] = {}
        for name, (call, _) in WRONG.items():
            try:
                call()
                said[name] = None
            except Exception as error:
                said[name] = str(error)
        return said

    said = run_on("npu", run, 1)[0]
    accepted = [name for name, text in said.items() if text is None]
    assert not accepted, f"accepted: {accepted}"
    unexplained = {n: t for n, t in said.items() if not re.search(WRONG[n][1], str(t))}
    assert not unexplained, unexplained


def test_a_kernel_that_nobody_computes_fails_at_its_launch() -> None:
    """torch_npu's own code is left where there is no CPU kernel: it must not leave what was in memory."""

    def run() -> str:
        try:
            torch.ops.npu.npu_clear_float_status(torch.zeros(8, device=NPU))
        except Exception as error:
            return str(error)
        return ""

    assert "no reference" in run_on("npu", run, 1)[0]
