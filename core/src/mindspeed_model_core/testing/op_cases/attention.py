"""Attention over packed documents and of all to all, and the parts of ring attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..tolerance import assert_close
from .case import Case, draw

CHUNKS = {
    "width 64, halves": (64, 4, 4, (16, 16)),
    "width 80, grouped, odd": (80, 6, 2, (7, 7, 7)),
    "width 128, grouped, unlike": (128, 8, 1, (5, 13, 1)),
}
"""Width, heads, heads of k and v, and the lengths of the chunks that go round; the first is the queries' own."""


def _head(q: Tensor, k: Tensor, v: Tensor, before: float, after: float) -> tuple[Tensor, Tensor]:
    """Attend with one head ``[tokens, width]`` to the tokens within reach; return the output and lse."""
    score = q @ k.T / math.sqrt(q.shape[1])
    for i in range(len(q)):
        for j in range(len(k)):
            if not -before <= j - i <= after:
                score[i, j] = -math.inf
    top = score.detach().amax(1, keepdim=True) if len(k) else score.new_zeros(len(q), 1)
    share = (score - top).exp()
    total = share.sum(1, keepdim=True)
    return share @ v / total.clamp_min(1e-300), (total.log() + top)[:, 0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool = True, window: Any = None
) -> Tensor:
    before, after = (math.inf if reach == -1 else reach for reach in window or (-1, -1))
    group = q.shape[1] // k.shape[1]
    out = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = (
            _head(a[:, h], b[:, h // group], c[:, h // group], before, 0 if causal else after)[0]
            for h in range(q.shape[1])
        )
        out.append(torch.stack(list(heads), 1))
    return torch.cat(out)


def _full(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    group, after = q.shape[2] // k.shape[2], 0 if causal else math.inf
    outs, lses = [], []
    for sample in range(q.shape[1]):
        heads = [
            _head(q[:, sample, h], k[:, sample, h // group], v[:, sample, h // group], math.inf, after)
            for h in range(q.shape[2])
        ]
        outs.append(torch.stack([out for out, _ in heads], 1))
        lses.append(torch.stack([lse for _, lse in heads]))
    return torch.stack(outs, 1), torch.stack(lses)


@torch.no_grad()
def _with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return _full(q, k, v, causal)


@torch.no_grad()
def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    a, b = lse.exp(), other_lse.exp()
    first, second = ((x / (a + b)).permute(2, 0, 1).unsqueeze(-1) for x in (a, b))
    return out * first + other * second, (a + b).log()


def _packed(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, causal: bool, window: Any = None, **how: Any
) -> Case:
    name = (
        how.pop("name", None)
        or f"{'.'.join(map(str, lengths))}-{heads}.{kv_heads}-{width}-{'causal' if causal else 'full'}-{window}"
    )
    operands = tuple(draw(sum(lengths), n, width, seed=s) for s, n in enumerate((heads, kv_heads, kv_heads)))
    named = {"causal": causal} if window is None else {"causal": causal, "window": window}
    return Case(ops.attention, name, operands, _attention, (lengths,), named, **how)


def _around(op: Any, formula: Any, shapes: tuple[tuple[int, ...], ...], *rest: Any, **how: Any) -> Case:
    name = "-".join(["x".join(map(str, shape)) for shape in shapes[:2]] + [str(x) for x in rest])
    operands = tuple(draw(*shape, seed=s) for s, shape in enumerate(shapes))
    return Case(op, name, operands, formula, rest, **how)


def _qkv(tokens: int, others: int, batch: int, heads: int, kv_heads: int, width: int) -> tuple[tuple[int, ...], ...]:
    return (tokens, batch, heads, width), (others, batch, kv_heads, width), (others, batch, kv_heads, width)


SHAPES = ((4, 4, 64), (8, 2, 64), (2, 2, 80), (3, 1, 128))
CASES = (
    *(
        _packed(lengths, *shape, causal)
        for lengths in ((19,), (6, 6), (1, 9, 4), (5, 0, 7, 0))
        for shape in SHAPES
        for causal in (True, False)
    ),
    *(
        _packed(lengths, 4, 2, width, causal, window)
        for width in (64, 80)
        for lengths in ((17,), (6, 6), (3, 0, 11))
        for causal, window in ((True, (4, 0)), (True, (2, 5)), (False, (3, 1)), (False, (-1, 2)), (False, (0, -1)))
    ),
    *(_packed((19, 3), 4, 2, width, causal) for width in (32, 96, 192, 256) for causal in (True, False)),
    _packed((9, 4), 4, 2, 64, True, (-1, -1)),
    _packed((0, 0), 4, 2, 64, True, reference_on=("npu",)),
    *(
        _around(ops.full_attention, lambda q, k, v: _full(q, k, v)[0], _qkv(*sizes))
        for sizes in ((13, 13, 2, 4, 4, 64), (7, 21, 1, 2, 2, 80), (9, 5, 3, 6, 2, 128))
    ),
    _around(ops.full_attention, lambda q, k, v: _full(q, k, v)[0], _qkv(0, 5, 2, 4, 4, 64), reference_on=("npu",)),
    *(
        _around(ops.attention_with_lse, _with_lse, _qkv(*sizes), causal)
        for sizes, causal in (
            ((16, 16, 2, 4, 4, 64), True),
            ((7, 21, 1, 4, 2, 80), False),
            ((11, 11, 2, 3, 1, 128), True),
        )
    ),
    *(
        _around(
            ops.merge_attention,
            _merged,
            ((7, 2, 3, width), (2, 3, 7), (7, 2, 3, width), (2, 3, 7)),
            only=(torch.float32, torch.float64),  # lse is never narrower
        )
        for width in (64, 80)
    ),
)


def check_ring(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold attention and its gradients, found chunk by chunk of the keys and merged, against the whole's.

    Queries are the first chunk's tokens; where they are causal they attend to no later token of their own chunk, and to
    all of the others, as later tokens do to earlier ones.
    """
    for name in CHUNKS:
        for causal in (False, True):
            found, want = _ring(name, device, dtype, causal)
            said = f"{name}, {'causal' if causal else 'full'}:"
            assert_close(
                {f"{said} {n}": x for n, x in found.items()}, {f"{said} {n}": x for n, x in want.items()}, bound
            )


def _ring(
    name: str, device: torch.device, dtype: torch.dtype, causal: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    width, heads, kv_heads, chunks = CHUNKS[name]
    rows, others = chunks[0], sum(chunks)
    drawn = [draw(n, 2, h, width, seed=s) for s, (n, h) in enumerate(((rows, heads), (others, kv_heads)) * 2)]
    q, k, grad, v = (x.to(device, dtype) for x in drawn)
    out = lse = None
    for number, (some_k, some_v) in enumerate(zip(k.split(chunks), v.split(chunks), strict=True)):
        found = ops.attention_with_lse(q, some_k, some_v, causal and number == 0)
        out, lse = found if out is None or lse is None else ops.merge_attention(out, lse, *found)
    assert out is not None and lse is not None
    parts = [
        ops.attention_backward(grad, q, some_k, some_v, out, lse, causal and number == 0)
        for number, (some_k, some_v) in enumerate(zip(k.split(chunks), v.split(chunks), strict=True))
    ]
    got = {"out": out, "lse": lse, "dq": torch.stack([p[0].cpu().double() for p in parts]).sum(0)}
    got |= {name: torch.cat([p[n] for p in parts]) for n, name in ((1, "dk"), (2, "dv"))}
    q, k, v = (x.cpu().double().requires_grad_() for x in (q, k, v))
    want = dict(zip(("out", "lse"), _whole(q, k, v, rows, causal), strict=True))
    gradients = torch.autograd.grad(want["out"], (q, k, v), grad.cpu().double())
    want |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    assert all(not x.requires_grad for x in got.values())
    return {n: x.cpu().double() for n, x in got.items()}, {n: x.detach() for n, x in want.items()}


def _whole(q: Tensor, k: Tensor, v: Tensor, own: int, causal: bool) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    a, b, c = (x.permute(1, 2, 0, 3) for x in (q, *(y.repeat_interleave(group, 2) for y in (k, v))))
    score = a @ b.mT / math.sqrt(q.shape[3])
    if causal:
        later = torch.zeros(own, k.shape[0], dtype=torch.bool)
        later[:, :own] = torch.ones(own, own, dtype=torch.bool).triu(1)
        score = score.masked_fill(later, -math.inf)
    return (score.softmax(-1) @ c).permute(2, 0, 1, 3), score.logsumexp(-1)
