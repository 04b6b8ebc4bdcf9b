"""Products of tensor parallelism with the collective beside each: in turn, or overlapped from level 2.

Operands are a layer's: ``x [tokens, ..., in]`` and ``weight [out, in]``, of which one dim is shared out over the ranks
of ``group``. Where tokens are shared out (dim 0), each rank holds as many. What is gathered for a product is gathered
again in backward instead of kept; a frozen weight has no gradient, and ``x`` is then not kept at all. ``chunks`` asks
for an overlap on any device: rows are cut into so many parts, or fewer where there are fewer, and one part's
collective runs beside the next one's product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .keep import keeps
from .linear import HALVES, PRODUCTS, Sum, accumulator, rows, sum_rows, weight_gradient
from .table import op


class _Pending:
    """A tensor that collectives are filling; ``read`` are the tensors that they read, which have to last as long."""

    def __init__(self, tensor: Tensor, works: list[Any], read: list[Tensor]) -> None:
        self.tensor, self.works, self.read = tensor, works, read

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.read.clear()
        return self.tensor


class _InTurn:
    """A product, then its collective, or the other way round."""

    def __init__(self, group: Any) -> None:
        self.group, self.size = group, group.size()

    def gather(self, x: Tensor) -> _Pending:
        """Start to join all ranks' rows."""
        out = x.new_empty(self.size * len(x), x.shape[1])
        return _Pending(out, [dist.all_gather_into_tensor(out, x, group=self.group, async_op=True)], [x])

    def gathered(self, x: Tensor, matrix: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Return all ranks' rows times a matrix, and with ``keep`` those rows."""
        joined = self.gather(x).wait()
        return joined @ matrix, joined

    def scattered(self, x: Tensor, matrix: Tensor) -> _Pending:
        """Return this rank's rows of the product, summed over ranks."""
        product = x @ matrix
        out = product.new_empty(len(product) // self.size, product.shape[1])
        return self._scatter(out, product)

    def summed(self, x: Tensor, matrix: Tensor) -> _Pending:
        """Return the product, summed over ranks."""
        # Not as a result of its own: one that is kept for when a block runs again may not be summed in place.
        product = torch.mm(x, matrix, out=x.new_empty(len(x), matrix.shape[1]))
        return _Pending(product, [dist.all_reduce(product, group=self.group, async_op=True)], [])

    def _scatter(self, out: Tensor, product: Tensor) -> _Pending:
        work = dist.reduce_scatter_tensor(out, product, group=self.group, async_op=True)
        return _Pending(out, [work], [product])


class _InChunks(_InTurn):
    """The same in parts, so that one part's collective runs beside another's product."""

    def __init__(self, group: Any, chunks: int) -> None:
        super().__init__(group)
        self.chunks = chunks

    def _parts(self, count: int) -> Iterator[slice]:
        step = max(-(-count // self.chunks), 1)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def gathered(self, x: Tensor, matrix: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        product = x.new_empty(self.size, len(x), matrix.shape[1])
        joined = x.new_empty(self.size, len(x) if keep else 0, x.shape[1])
        started = [(part, self.gather(x[part])) for part in self._parts(len(x))]
        for part, pending in started:
            here = pending.wait()
            product[:, part] = (here @ matrix).unflatten(0, (self.size, -1))
            if keep:
                joined[:, part] = here.unflatten(0, (self.size, -1))
        return product.flatten(0, 1), joined.flatten(0, 1)

    def scattered(self, x: Tensor, matrix: Tensor) -> _Pending:
        shares = x.unflatten(0, (self.size, len(x) // self.size))
        out = x.new_empty(shares.shape[1], matrix.shape[1])
        # Each rank's share gives a part of its rows, so that what comes back lies together in the result.
        return self._all(
            out, (self._scatter(out[p], shares[:, p].flatten(0, 1) @ matrix) for p in self._parts(len(out)))
        )

    def summed(self, x: Tensor, matrix: Tensor) -> _Pending:
        out = x.new_empty(len(x), matrix.shape[1])

        def start(part: slice) -> _Pending:
            torch.mm(x[part], matrix, out=out[part])
            return _Pending(out, [dist.all_reduce(out[part], group=self.group, async_op=True)], [])

        return self._all(out, map(start, self._parts(len(x))))

    @staticmethod
    def _all(out: Tensor, started: Iterator[_Pending]) -> _Pending:
        parts = list(started)
        return _Pending(out, [w for part in parts for w in part.works], [t for part in parts for t in part.read])


class _Fused(_InTurn):
    """Both in one operator of CANN (MC2), which overlaps them itself."""

    @property
    def name(self) -> str:
        """Return what HCCL calls the group."""
        backend = self.group._get_backend(torch.device("npu"))
        return str(backend.get_hccl_comm_name(dist.get_rank()))

    def gather(self, x: Tensor) -> _Pending:
        """Join all ranks' rows before an operator uses the group's communicator on another stream."""
        return _Pending(super().gather(x).wait(), [], [])

    def gathered(self, x: Tensor, matrix: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        product, joined = torch.ops.npu.npu_all_gather_base_mm(x, matrix, self.name, self.size, gather_output=keep)
        return product, joined

    def scattered(self, x: Tensor, matrix: Tensor) -> _Pending:
        return _Pending(torch.ops.npu.npu_mm_reduce_scatter_base(x, matrix, self.name, self.size), [], [])

    def summed(self, x: Tensor, matrix: Tensor) -> _Pending:
        return _Pending(torch.ops.npu.npu_mm_all_reduce_base(x, matrix, self.name), [], [])


class _Column(torch.autograd.Function):
    """Output features are shared out: the input is whole, or with ``tokens`` gathered, and its gradient a sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Sum | None, how: _InTurn, tokens: bool
    ) -> Tensor:
        ctx.total, ctx.how, ctx.tokens, ctx.shape = total, how, tokens, x.shape
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        flat = rows(x)
        y = how.gathered(flat, weight.T, keep=False)[0] if tokens else flat @ weight.T
        if bias is not None:
            y = y + bias if keeps(PRODUCTS) else y.add_(bias)  # what is kept of a product may not change
        return y.view(len(x) * (how.size if tokens else 1), *x.shape[1:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        how, flat = ctx.how, rows(grad)
        to_x = to_weight = gathering = None
        if needs_weight and ctx.tokens:
            gathering = how.gather(rows(x))
        if needs_x:
            to_x = (how.scattered if ctx.tokens else how.summed)(flat, weight)
        if needs_weight:
            to_weight = weight_gradient(ctx.total, flat, rows(x) if gathering is None else gathering.wait())
        to_bias = sum_rows(flat) if needs_bias else None
        return None if to_x is None else to_x.wait().view(ctx.shape), to_weight, to_bias, None, None, None


class _Row(torch.autograd.Function):
    """Input features are shared out: the output is a sum, of which with ``tokens`` each rank keeps its share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Sum | None, how: _InTurn, tokens: bool) -> Tensor:
        ctx.total, ctx.how, ctx.tokens, ctx.shape = total, how, tokens, x.shape
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        y = (how.scattered if tokens else how.summed)(rows(x), weight.T).wait()
        return y.view(len(x) // (how.size if tokens else 1), *x.shape[1:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        how, flat = ctx.how, rows(grad)
        to_x = None
        if needs_x and ctx.tokens:
            to_x, flat = how.gathered(flat, weight, keep=needs_weight)
        elif needs_x:
            to_x = flat @ weight
        elif ctx.tokens:
            flat = how.gather(flat).wait()
        to_weight = weight_gradient(ctx.total, flat, rows(x)) if needs_weight else None
        return None if to_x is None else to_x.view(ctx.shape), to_weight, None, None, None


def _column(x: Tensor, weight: Tensor, bias: Tensor | None, how: _InTurn, tokens: bool) -> Tensor:
    return _Column.apply(x, weight, bias, accumulator(weight), how, tokens)  # type: ignore[no-any-return]


def _row(x: Tensor, weight: Tensor, how: _InTurn, tokens: bool) -> Tensor:
    return _Row.apply(x, weight, accumulator(weight), how, tokens)  # type: ignore[no-any-return]


# --- references


@op
def column_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: int = 1) -> Tensor:
    """Return ``x W^T + b`` for this rank's output features; backward adds up the gradient of ``x`` over ranks."""
    return _column(x, weight, bias, _InTurn(group), tokens=False)


@op
def all_gather_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: int = 1) -> Tensor:
    """Return ``x W^T + b`` of all ranks' tokens; backward gives each rank the summed gradient of its own tokens."""
    return _column(x, weight, bias, _InTurn(group), tokens=True)


@op
def matmul_all_reduce(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    """Return ``x W^T`` for this rank's input features, added up over ranks."""
    return _row(x, weight, _InTurn(group), tokens=False)


@op
def matmul_reduce_scatter(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    """Return this rank's share of the tokens of ``x W^T`` for its input features, added up over ranks."""
    return _row(x, weight, _InTurn(group), tokens=True)


# --- MC2


def _halves(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in HALVES and x.numel() > 0 and weight.numel() > 0


def _sums(x: Tensor, weight: Tensor, group: Any) -> bool:
    # Of the three operators, CANN documents this one for inference alone.
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not learns and _halves(x, weight) and group.size() in (1, 2, 4, 8)


def _shares(x: Tensor, weight: Tensor, group: Any) -> bool:
    # Forward multiplies over the input features, backward over the output features.
    wide = all(256 <= width < 65535 for width in weight.shape)
    return _halves(x, weight) and wide and group.size() in (2, 4, 8)


_ANY = "without gradients; fp16, bf16; 1, 2, 4 or 8 ranks; not empty"
_WIDE = "fp16, bf16; both widths of the weight's share from 256 to 65534; 2, 4 or 8 ranks; not empty"
_GATHERS = "npu_all_gather_base_mm npu_mm_reduce_scatter_base"


@all_gather_matmul.on("npu", _GATHERS, when=_WIDE, takes=lambda x, w, b, group, chunks=1: _shares(x, w, group), level=2)
def _fused_all_gather(x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: int = 1) -> Tensor:
    return _column(x, weight, bias, _Fused(group), tokens=True)


@matmul_all_reduce.on(
    "npu", "npu_mm_all_reduce_base", when=_ANY, takes=lambda x, w, group, chunks=1: _sums(x, w, group), level=2
)
def _fused_all_reduce(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    return _row(x, weight, _Fused(group), tokens=False)


@matmul_reduce_scatter.on(
    "npu", _GATHERS, when=_WIDE, takes=lambda x, w, group, chunks=1: _shares(x, w, group), level=2
)
def _fused_reduce_scatter(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    return _row(x, weight, _Fused(group), tokens=True)


# --- chunks


def _chunked_column(x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: int = 1) -> Tensor:
    return _column(x, weight, bias, _InChunks(group, chunks), tokens=False)


def _chunked_all_gather(x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: int = 1) -> Tensor:
    return _column(x, weight, bias, _InChunks(group, chunks), tokens=True)


def _chunked_all_reduce(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    return _row(x, weight, _InChunks(group, chunks), tokens=False)


def _chunked_reduce_scatter(x: Tensor, weight: Tensor, group: Any, chunks: int = 1) -> Tensor:
    return _row(x, weight, _InChunks(group, chunks), tokens=True)


for _kind in ("npu", "cuda", "cpu"):
    _asked: dict[str, Any] = {"when": "chunks asked for", "takes": lambda *_, chunks=1: chunks > 1, "level": 2}
    column_matmul.on(_kind, "all_reduce", **_asked)(_chunked_column)
    all_gather_matmul.on(_kind, "all_gather reduce_scatter", **_asked)(_chunked_all_gather)
    matmul_all_reduce.on(_kind, "all_reduce", **_asked)(_chunked_all_reduce)
    matmul_reduce_scatter.on(_kind, "reduce_scatter all_gather", **_asked)(_chunked_reduce_scatter)
