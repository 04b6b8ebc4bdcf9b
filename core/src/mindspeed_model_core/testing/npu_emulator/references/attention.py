"""Fused attention in all its layouts, forward, backward from the kept statistics, and the merge of ring attention.

Statistics are the softmax's maximum and sum of each row, repeated 8 times. In the layout TND they are in the order
heads, tokens within each sequence, unless ``softmax_layout`` asks for tokens, heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import FLOATS, Function, reference, require, rule

_EVERY = 2147483647
_DIMS = {"BSH": 3, "SBH": 3, "TND": 3, "BNSD": 4, "BSND": 4}
_HEADS_DIM = {"BNSD": 1, "BSND": 2, "TND": 1}
_COMPRESSED = 2048
_SEQUENCES = 1024
Ends = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class _Sizes:
    """How q, k and v lie in memory: the layout, their heads, and where sequences end."""

    layout: str
    heads: int
    kv_heads: int
    q_ends: list[int]
    kv_ends: list[int]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, head_num: int, layout: str, q_ends: Ends, kv_ends: Ends) -> _Sizes:
        layout = layout.upper()
        if layout in _HEADS_DIM:
            kv_heads = k.shape[_HEADS_DIM[layout]]
        else:
            kv_heads = k.shape[2] // (q.shape[2] // head_num)
        return cls(layout, head_num, kv_heads, _whole(q_ends), _whole(kv_ends))

    def sequences(self, x: Tensor, kv: bool = False) -> list[Tensor]:
        """Return views ``[heads, tokens, width]`` of each sequence."""
        heads = self.kv_heads if kv else self.heads
        if self.layout == "TND":
            ends = self.kv_ends if kv else self.q_ends
            return [x[a:b].transpose(0, 1) for a, b in zip([0, *ends], ends, strict=False)]
        if self.layout == "BNSD":
            return list(x)
        if self.layout == "BSND":
            return [y.transpose(0, 1) for y in x]
        by_sample = x if self.layout == "BSH" else x.transpose(0, 1)
        return [y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in by_sample]

    def statistics(self, x: Tensor, order: str) -> list[Tensor]:
        """Return views ``[heads, tokens, 8]`` of each sequence's statistics."""
        if self.layout != "TND":
            return list(x)
        spans = list(zip([0, *self.q_ends], self.q_ends, strict=False))
        if order == "TND":
            return [x[a:b].transpose(0, 1) for a, b in spans]
        rows, n = x.view(-1, x.shape[-1]), self.heads
        return [rows[a * n : b * n].view(n, b - a, x.shape[-1]) for a, b in spans]


def _whole(ends: Ends) -> list[int]:
    """Return the ends without the zeros that leave the last sequences out."""
    values = [] if ends is None else [int(e) for e in ends]
    while values and values[-1] == 0:
        values.pop()
    return values


def _blocked(
    rows: int, columns: int, mask: Tensor | None, mode: int, before: int, after: int, sample: int
) -> Tensor | None:
    """Return where scores ``[rows, columns]`` or ``[heads, rows, columns]`` are left out; None for nowhere."""
    if mask is None:
        return None
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    if mode in (0, 1):
        if mask.dim() == 4:
            mask = mask[sample if mask.shape[0] > 1 else 0]
        mask = mask.bool()[..., :rows, :columns]
        outside = (j > i + after) | (j < i - before)
        if mode == 0 and bool((outside & ~mask).any()):
            raise NotImplementedError("a mask that keeps what pre_tockens and next_tockens leave out has no reference")
        return mask
    if mode == 2:
        return j > i
    shift = columns - rows  # from here on diagonals start at the lower right corner
    if mode == 3:
        return j > i + shift
    if mode == 4:
        return (j > i + shift + after) | (j < i + shift - before)
    raise NotImplementedError(f"sparse_mode={mode} has no reference")


def _scores(q: Tensor, k: Tensor, scale: float, pse: Tensor | None, pse_type: int, sample: int) -> Tensor:
    """Return scaled products ``[heads, rows, columns]`` with the position term, added before (1) or after (0)."""
    out = q.float() @ _spread(k, len(q)).float().transpose(1, 2)
    if pse is None:
        return out * scale
    if pse.dim() != 4 or pse.shape[-2] not in (1, q.shape[1]) or pse.shape[-1] != k.shape[1] or pse_type not in (0, 1):
        raise NotImplementedError(f"pse {tuple(pse.shape)} with pse_type={pse_type} has no reference")
    term = pse[sample if pse.shape[0] > 1 else 0].float()
    return (out + term) * scale if pse_type == 1 else out * scale + term


def _spread(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // len(x), 0)


@rule("npu_fusion_attention", "npu_fusion_attention_v2", "npu_fusion_attention_v3")
def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    inner_precise: int = 0,
    actual_seq_qlen: Ends = None,
    actual_seq_kvlen: Ends = None,
    sparse_mode: int = 0,
    **_: object,
) -> None:
    layout = input_layout.upper()
    require(layout in _DIMS, f"input_layout={input_layout!r} is one of {', '.join(_DIMS)}")
    alike = query.dtype == key.dtype == value.dtype and query.dtype in FLOATS
    require(alike, f"q, k and v are all fp16, bf16 or fp32, not {query.dtype}, {key.dtype}, {value.dtype}")
    require(pse is None or pse.dtype == query.dtype, "pse has the type of q")
    dims = _DIMS[layout]
    require(query.dim() == key.dim() == value.dim() == dims, f"{layout} has {dims} dims")
    if layout in _HEADS_DIM:
        heads = query.shape[_HEADS_DIM[layout]]
        require(heads == head_num, f"head_num={head_num} is the heads of q, {heads}")
        width, kv_heads, value_width = query.shape[-1], key.shape[_HEADS_DIM[layout]], value.shape[-1]
        require(key.shape[-1] == width, f"k is as wide as q: {key.shape[-1]}, {width}")
    else:
        require(query.shape[2] % head_num == 0, f"head_num={head_num} divides q's {query.shape[2]} features")
        width = query.shape[2] // head_num
        require(key.shape[2] % width == 0, f"a head's width {width} divides k's {key.shape[2]} features")
        kv_heads = key.shape[2] // width
        value_width = value.shape[2] // max(kv_heads, 1)
    require(
        head_num % kv_heads == 0 and head_num <= 256, f"{head_num} heads (at most 256) share {kv_heads} for k and v"
    )
    require(1 <= width <= 768 and value_width <= width, f"widths q {width}, v {value_width}: v no wider, at most 768")
    require(inner_precise in (0, 1, 2), f"inner_precise={inner_precise} is 0, 1 or 2")
    require(0 <= sparse_mode <= 8, f"sparse_mode={sparse_mode} is 0 to 8")
    if atten_mask is None:
        require(sparse_mode == 0, f"sparse_mode={sparse_mode} needs atten_mask, else all is attended to")
    else:
        _check_mask(atten_mask, sparse_mode, layout)
        if sparse_mode < 2 and layout != "TND":
            at = {"BNSD": 2, "SBH": 0}.get(layout, 1)
            whole = query.shape[at], key.shape[at]
            said = f"sparse_mode={sparse_mode} takes a mask of every q and k, {whole}, not {tuple(atten_mask.shape)}"
            require(tuple(atten_mask.shape[-2:]) == whole, said)
    if layout == "TND":
        for name, given, tokens in (("q", actual_seq_qlen, query), ("kv", actual_seq_kvlen, key)):
            ends = _whole(given)
            ordered = ends == sorted(ends) and bool(ends) and ends[-1] <= len(tokens)
            require(ordered, f"actual_seq_{name}len={ends} are ends in order within {len(tokens)} tokens")
            require(len(ends) <= _SEQUENCES, f"{len(ends)} sequences: TND takes at most {_SEQUENCES}")


@functools.cache
def _upper() -> Tensor:
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool).triu(1)


def _check_mask(mask: Tensor, mode: int, layout: str) -> None:
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is bool or uint8, not {mask.dtype}")
    require(layout != "TND" or mask.dim() == 2, "atten_mask has 2 dims in the layout TND")
    if mode in (2, 3, 4):
        shape = tuple(mask.shape)
        require(shape[-2:] == (_COMPRESSED, _COMPRESSED), f"sparse_mode={mode} takes the 2048 x 2048 mask, not {shape}")
        same = torch.equal(mask.bool().reshape(-1, _COMPRESSED, _COMPRESSED)[0], _upper())
        require(same, f"sparse_mode={mode} takes the mask whose upper triangle, without the diagonal, is true")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    pre_tockens: int = _EVERY,
    next_tockens: int = _EVERY,
    actual_seq_qlen: Ends = None,
    actual_seq_kvlen: Ends = None,
    sparse_mode: int = 0,
    softmax_layout: str = "",
    pse_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _Sizes.of(query, key, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen)
    wide = sizes.layout in ("BSH", "SBH")
    width = value.shape[-1] // sizes.kv_heads * head_num if wide else value.shape[-1]
    out = query.new_zeros(*query.shape[:-1], width)
    if sizes.layout == "TND":
        shape = (len(query), head_num, 8)
    else:
        tokens = {"BNSD": 2, "SBH": 0}.get(sizes.layout, 1)
        shape = (query.shape[1 if sizes.layout == "SBH" else 0], head_num, query.shape[tokens], 8)  # type: ignore[assignment]
    largest, total = torch.zeros(shape), torch.zeros(shape)
    parts = zip(
        sizes.sequences(query),
        sizes.sequences(key, kv=True),
        sizes.sequences(value, kv=True),
        sizes.sequences(out),
        sizes.statistics(largest, softmax_layout),
        sizes.statistics(total, softmax_layout),
        strict=True,
    )
    for sample, (q, k, v, o, m, l) in enumerate(parts):  # noqa: E741
        if not q.shape[1]:
            continue
        scores = _scores(q, k, scale, pse, pse_type, sample)
        blocked = _blocked(q.shape[1], k.shape[1], atten_mask, sparse_mode, pre_tockens, next_tockens, sample)
        if blocked is not None:
            scores = scores.masked_fill(blocked, torch.finfo(torch.float32).min)
        m.copy_(scores.amax(-1, keepdim=True).expand_as(m))
        weights = (scores - m[..., :1]).exp()
        if blocked is not None:
            weights = weights.masked_fill(blocked, 0)
        l.copy_(weights.sum(-1, keepdim=True).expand_as(l))
        o.copy_((weights @ _spread(v, len(q)).float() / l[..., :1].clamp_min(1e-30)).to(out.dtype))
    return out, largest, total


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = _EVERY,
    next_tockens: int = _EVERY,
    actual_seq_qlen: Ends = None,
    actual_seq_kvlen: Ends = None,
    sparse_mode: int = 0,
    softmax_layout: str = "",
    pse_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the statistics and the output that were kept, as the kernel computes them."""
    sizes = _Sizes.of(query, key, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen)
    dq, dk, dv = (torch.zeros(x.shape) for x in (query, key, value))
    parts = zip(
        sizes.sequences(query),
        sizes.sequences(key, kv=True),
        sizes.sequences(value, kv=True),
        sizes.sequences(attention_in),
        sizes.sequences(dy),
        sizes.statistics(softmax_max, softmax_layout),
        sizes.statistics(softmax_sum, softmax_layout),
        zip(sizes.sequences(dq), sizes.sequences(dk, kv=True), sizes.sequences(dv, kv=True), strict=True),
        strict=True,
    )
    for sample, (q, k, v, o, g, m, l, (to_q, to_k, to_v)) in enumerate(parts):  # noqa: E741
        if not q.shape[1]:
            continue
        scores = _scores(q, k, scale_value, pse, pse_type, sample)
        weights = (scores - m[..., :1]).exp() / l[..., :1].clamp_min(1e-30)
        blocked = _blocked(q.shape[1], k.shape[1], atten_mask, sparse_mode, pre_tockens, next_tockens, sample)
        if blocked is not None:
            weights = weights.masked_fill(blocked, 0)
        g, o = g.float(), o.float()
        weighted = g @ _spread(v, len(q)).float().transpose(1, 2)
        slope = weights * (weighted - (g * o).sum(-1, keepdim=True)) * scale_value
        to_q.copy_(slope @ _spread(k, len(q)).float())
        to_k.copy_((slope.transpose(1, 2) @ q.float()).unflatten(0, (len(k), -1)).sum(1))
        to_v.copy_((weights.transpose(1, 2) @ g).unflatten(0, (len(k), -1)).sum(1))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


# --- the three versions of the operator differ in names and in how many outputs they leave empty


def _version(function: Function, empty: int, *, second: bool = False) -> Function:
    """Return a function under the names of one version's arguments, with ``empty`` outputs more than it computes."""
    names = {name: name for name in inspect.signature(function).parameters}
    if second:
        names |= {"pre_tockens": "pre_tokens", "next_tockens": "next_tokens"}
    else:
        del names["pse_type"]

    def version(**given: Any) -> tuple[Any, ...]:
        return *function(**{own: given[name] for own, name in names.items()}), *[None] * empty

    version.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names.values()]
    )
    return version


reference("npu_fusion_attention")(_version(_forward, 4))
reference("npu_fusion_attention_v2")(_version(_forward, 4, second=True))
reference("npu_fusion_attention_v3")(_version(_forward, 3))
reference("npu_fusion_attention_grad", "npu_fusion_attention_grad_v3")(_version(_backward, 2))
reference("npu_fusion_attention_grad_v2")(_version(_backward, 4, second=True))


# --- ring attention


@rule("npu_fusion_attention_grad")
def _check_backward(softmax_max: Tensor | None, softmax_sum: Tensor | None, **_: object) -> None:
    for name, given in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
        require(given is not None and given.shape[-1] == 8, f"{name} is given, each row's value 8 times")


@rule("npu_ring_attention_update")
def _check_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    **_: object,
) -> None:
    alike = prev_attn_out.shape == cur_attn_out.shape and prev_attn_out.dtype == cur_attn_out.dtype
    require(alike, "both outputs have one shape and one type")
    statistics = prev_softmax_max, prev_softmax_sum, cur_softmax_max, cur_softmax_sum
    require(all(s.dtype == torch.float32 for s in statistics), "statistics are fp32")
    require(len({s.shape for s in statistics}) == 1, "statistics have one shape")
    require(input_layout in ("SBH", "TND"), f"input_layout={input_layout!r} is SBH or TND")
    if input_layout == "TND":
        starts_at_zero = actual_seq_qlen is not None and int(actual_seq_qlen[0]) == 0
        require(starts_at_zero, "TND: actual_seq_qlen are ends from 0 on, the 0 included")


@reference("npu_ring_attention_update")
def _update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge attention over two parts of the keys (Liu et al. 2023, arXiv:2310.01889)."""
    largest = torch.maximum(prev_softmax_max, cur_softmax_max)
    before = prev_softmax_sum * (prev_softmax_max - largest).exp()
    now = cur_softmax_sum * (cur_softmax_max - largest).exp()
    total = before + now
    heads = prev_softmax_max.shape[1]
    ends = [] if actual_seq_qlen is None else _whole(actual_seq_qlen[1:])
    sizes = _Sizes(input_layout, heads, heads, ends, ends)
    out = torch.zeros_like(prev_attn_out)
    parts = zip(
        sizes.sequences(out),
        sizes.sequences(prev_attn_out),
        sizes.sequences(cur_attn_out),
        sizes.statistics(before / total, input_softmax_layout),
        sizes.statistics(now / total, input_softmax_layout),
        strict=True,
    )
    for to, a, b, x, y in parts:
        to.copy_(a.float() * x[..., :1] + b.float() * y[..., :1])
    return out, largest, total
