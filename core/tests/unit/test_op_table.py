"""The table picks what serves an op, and the reference of every op equals its formula."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.ops import table
from mindspeed_model_core.ops.loss import AT_ONCE, _padded
from mindspeed_model_core.testing.op_cases import CASES, CHECKS, check, loss
from mindspeed_model_core.testing.op_cases.case import in_types, serving
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("case", "dtype"), in_types(CASES, BOUND))
def test_every_op_equals_its_formula(case, dtype) -> None:
    with ops.at_level(0):
        check(case, CPU, dtype, BOUND[dtype])
    check(case, CPU, dtype, BOUND[dtype])


def test_no_npu_is_given_fp64() -> None:
    """It has no such type: what an entry takes must say so."""
    assert not [str(case) for case in CASES if serving(case, "npu", torch.float64) is not None]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", CHECKS)
def test_every_op_of_its_own_kind_equals_its_formula(name, level, dtype) -> None:
    with ops.at_level(level):
        CHECKS[name](CPU, dtype, BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("vocabulary", [5, 61, 1003])
def test_a_loss_of_padded_logits_equals_its_formula(vocabulary, parts, dtype) -> None:
    loss.check_sums(_padded, vocabulary, parts, CPU, dtype, BOUND[dtype])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("added", [False, True])
def test_products_of_a_padded_vocabulary_are_aligned(added, parts, monkeypatch) -> None:
    """But for that of the last few rows, where they are added to a sum that is not padded."""
    products: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                products.append(tuple(size for x in args if isinstance(x, Tensor) for size in (*x.shape, *x.stride())))
            return function(*args, **(kwargs or {}))

    monkeypatch.setitem(AT_ONCE, "cpu", 24 * 61 // parts + 1)
    x, weight = (torch.ones(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (24, 61))
    if added:
        ops.accumulate_gradient(weight, torch.zeros_like(weight))
    with Products():
        _padded(x, weight, torch.zeros(24, dtype=torch.int64)).backward()
    odd = [sizes for sizes in products if any(size % 8 for size in sizes if size > 1)]
    assert len(products) == (3 + (parts > 1) + added) * parts
    assert len(odd) == added * parts and all(5 in sizes for sizes in odd)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "padded"),
    [(61, torch.bfloat16, True), (60, torch.float16, True), (56, torch.bfloat16, False), (61, torch.float32, False)],
)
def test_halves_of_an_odd_vocabulary_are_padded_on_cuda(vocabulary, dtype, padded) -> None:
    x, weight = torch.ones(24, 16, dtype=dtype), torch.ones(vocabulary, 16, dtype=dtype)
    served = ops.linear_cross_entropy.serving("cuda", x, weight, torch.zeros(24, dtype=torch.int64))
    assert (served is not None and served.function is _padded) == padded


def test_a_causal_chunk_is_the_queries_own() -> None:
    q, k = torch.ones(3, 1, 2, 8), torch.ones(4, 1, 2, 8)
    with pytest.raises(ValueError, match="as many keys as queries, not 4 and 3"):
        ops.attention_with_lse(q, k, k, True)


def test_keys_that_are_not_there_weigh_nothing() -> None:
    q, k = torch.randn(3, 1, 2, 8), torch.randn(4, 1, 2, 8)
    some, none = ops.attention_with_lse(q, k, k, False), ops.attention_with_lse(q, k[:0], k[:0], False)
    assert not none[0].any() and bool((none[1] == -torch.inf).all())
    for merged in (ops.merge_attention(*some, *none), ops.merge_attention(*none, *some)):
        assert all(torch.equal(a, b) for a, b in zip(merged, some, strict=True))


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "lengths", "taken"),
    [
        (256, 768, torch.float32, (2, 1), True),
        (257, 8, torch.float32, (3,), False),
        (2, 769, torch.bfloat16, (3,), False),
        (2, 8, torch.float64, (3,), False),
        (1, 8, torch.bfloat16, (2, *[1] * 1023, 0), True),
        (1, 8, torch.bfloat16, (2, *[1] * 1024), False),
        (1, 8, torch.bfloat16, (1,) * 1025, True),
    ],
)
def test_an_npu_serves_attention_of_the_documented_sizes(heads, width, dtype, lengths, taken) -> None:
    q = torch.empty(sum(lengths), heads, width, dtype=dtype)
    assert (ops.attention.serving("npu", q, q, q, lengths) is not None) == taken


@pytest.mark.parametrize(
    ("tokens", "out", "width", "dtype", "taken"),
    [
        (4, 65535, 1, torch.bfloat16, True),
        (1, 1, 65535, torch.float16, True),
        (4, 65536, 1, torch.bfloat16, False),
        (4, 1, 65536, torch.bfloat16, False),
        (0, 7, 5, torch.bfloat16, False),
        (5, 7, 5, torch.float32, False),
    ],
)
def test_an_npu_adds_products_of_the_documented_sizes(tokens, out, width, dtype, taken) -> None:
    total, a, b = (
        torch.empty(out, width),
        torch.empty(tokens, out, dtype=dtype),
        torch.empty(tokens, width, dtype=dtype),
    )
    assert (ops.accumulate_product_.serving("npu", total, a, b) is not None) == taken
    fused = ops.accumulate_product_.serving("cuda", total, a, b)
    assert (fused is not None) == (dtype != torch.float32)


def _norm(dtype=torch.bfloat16, rows=4, width=8, **other):
    weight = torch.empty(width, dtype=other.get("weight", dtype))
    return ops.layer_norm, (torch.empty(rows, width, dtype=dtype), weight, other.get("bias", weight), 1e-5)


def _add(dtype=torch.bfloat16, shape=(4, 8), **named):
    x, weight = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
    return ops.add_layer_norm, (x, torch.empty(shape, dtype=dtype), weight, weight, 1e-5, *named.values())


def _adaln(shape=(2, 8), wide=torch.float32):
    shift = torch.empty(shape, dtype=wide)
    return ops.adaln, (torch.empty(5, 2, 8, dtype=torch.bfloat16), shift, shift, 1e-5)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (_norm(), True),
        (_norm(torch.float64), False),
        (_norm(width=8192), True),
        (_norm(width=8193), False),
        (_norm(torch.float32, width=8192), False),
        (_norm(rows=0), False),
        (_norm(bias=None), False),
        (_norm(weight=torch.float32), False),
        (_add(), True),
        (_add(torch.float32), False),
        (_add(shape=(8,)), False),
        (_add(dropout=0.1, training=False), True),
        (_add(dropout=0.0, training=True), True),
        (_add(dropout=0.1, training=True), False),
        (_adaln(), True),
        (_adaln(wide=torch.bfloat16), True),
        (_adaln(wide=torch.float64), False),
        (_adaln((1, 8)), False),
        (_adaln((1, 2, 8)), False),
        ((ops.adaln, (torch.empty(5, 2, 3, 8), torch.empty(2, 3, 8), torch.empty(2, 3, 8), 1e-5)), False),
        ((ops.sum_rows, (torch.empty(2048, 512, dtype=torch.bfloat16),)), True),
        ((ops.sum_rows, (torch.empty(512, 2048, dtype=torch.bfloat16).T,)), False),
        ((ops.sum_rows, (torch.empty(2048, 512, dtype=torch.bfloat16, requires_grad=True),)), False),
        ((ops.sum_rows, (torch.empty(2047, 512, dtype=torch.bfloat16),)), False),
        ((ops.sum_rows, (torch.empty(2048, 512),)), False),
    ],
)
def test_triton_serves_what_its_kernels_are_for(asked, taken, monkeypatch) -> None:
    monkeypatch.setattr(table, "has_triton", lambda: True)
    op, operands = asked

    def by_triton() -> bool:
        entry = op.serving("cuda", *operands)
        return entry is not None and entry.by == "triton"

    assert by_triton() == taken
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not by_triton()


def test_a_kept_projection_is_not_turned_where_it_lies(monkeypatch) -> None:
    """Its kernel writes what no version tells of."""
    monkeypatch.setattr(table, "has_triton", lambda: True)
    x, turn = torch.empty(5, 8, 64, dtype=torch.bfloat16), torch.empty(5, 64)

    def by() -> str:
        entry = ops.rope_projected_.serving("cuda", x, turn, turn, 2)
        return "" if entry is None else entry.by

    assert by() == "triton"
    for names, wanted in ((ops.ATTENTION, "triton"), (ops.ATTENTION | ops.PRODUCTS, "torch.compile")):
        for run in ops.checkpointed(names):
            with run:
                assert by() == wanted


def test_a_window_is_counts_or_minus_one() -> None:
    q = torch.ones(3, 2, 8)
    for level in (0, 2):
        with ops.at_level(level), pytest.raises(ValueError, match=r"window=\(2, -2\)"):
            ops.attention(q, q, q, (3,), window=(2, -2))


@pytest.fixture
def double() -> Iterator[ops.Op]:
    @ops.op
    def double(x: Tensor) -> Tensor:
        return 2 * x

    double.on("cpu", "wide", when="fp64", takes=lambda x: x.dtype == torch.float64)(lambda x: x + 100)
    double.on("cpu", "overlapped", when="two dims", takes=lambda x: x.dim() == 2, level=2)(lambda x: x + 200)
    yield double
    del table.TABLE["double"]


def test_the_first_entry_that_takes_the_operands_serves(double) -> None:
    one, two = torch.ones(1), torch.ones(1, 1)
    assert double(one) == 2 and double(two) == 201 and double(two.double()) == 101
    with ops.at_level(1):
        assert double(two) == 2 and double(two.double()) == 101
    with ops.at_level(0):
        assert double(two.double()) == 2
    assert double.serving("npu", one) is None


def test_a_level_ends_with_its_context_and_reaches_backward(double) -> None:
    with pytest.raises(KeyError), ops.at_level(0):
        raise KeyError
    assert ops.level() == 2


def test_the_environment_asks_for_the_reference(double, monkeypatch) -> None:
    table._reference = None
    monkeypatch.setenv(table.VARIABLE, "reference")
    try:
        assert ops.level() == 0 and double(torch.ones(1, 1)) == 2
        table._reference = None
        monkeypatch.setenv(table.VARIABLE, "fused")
        with pytest.raises(UserError, match="MINDSPEED_MODEL_OPS='fused': is reference, or not set"):
            ops.level()
    finally:
        monkeypatch.undo()
        table._reference = None


def test_a_width_that_changes_gets_a_graph_of_its_own(monkeypatch) -> None:
    graphs = []

    def recorded(graph, _):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append(next([str(size) for size in x.shape] for x in values if isinstance(x, Tensor)))
        return graph.forward

    def double(x: Tensor, labels: Tensor) -> Tensor:
        return x.sum(-1) * labels

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recorded))
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        call = table.compiled(double)
        for rows, width in [(4, 8), (5, 8), (6, 8), (6, 16), (7, 16), (9, 24), (9, 8)]:
            assert torch.equal(call(torch.ones(rows, width), torch.ones(rows)), torch.full((rows,), float(width)))
    assert [width for _, width in graphs] == ["8", "8", "16", "24"]
    assert not graphs[1][0].isdigit()
