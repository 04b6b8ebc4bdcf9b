"""Scaled dot-product attention: over documents packed back to back, and of every token to every other.

Scores are scaled by 1/sqrt(head width) (Vaswani et al. 2017, arXiv:1706.03762). Heads of q in equal shares use one head
of k and v (Ainslie et al. 2023, arXiv:2305.13245).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import device as devices
from .apart import empty_like_parts
from .table import FLOATS, op

Band = tuple[int, int]
"""How many tokens before and after its own a token attends to; -1 is all."""
ATTENTION = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention_for_cpu aten::_scaled_dot_product_flash_attention "
        "aten::_scaled_dot_product_efficient_attention aten::_scaled_dot_product_cudnn_attention "
        "aten::_scaled_dot_product_fused_attention_overrideable aten::_flash_attention_forward "
        "torch_attn::_varlen_attn mindspeed_model::flash_attention "
        "npu::npu_fusion_attention npu::npu_fusion_attention_v2 npu::npu_fusion_attention_v3"
    ).split()
)
"""The operators, as the dispatcher names them, one of which serves attention wherever it is fused."""
ALL, CAUSAL = (-1, -1), (-1, 0)
HALF = (torch.float16, torch.bfloat16)
_EVERY = 2**31 - 1
KEYS = 1024
"""Fewest keys for FlashAttention-4, unless documents are unlike.

On an H200 attention to 768 keys takes 0.93 ms by it and 0.99 by cuDNN (16 samples of 24 heads of 128), to a text's 448
or 512 as much by both, and as an operator it cost the host 0.3 ms a call.
"""


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    """Attend within each document; softmax is in fp32 or wider.

    ``q`` is ``[tokens, heads, width]``, ``k`` and ``v`` are ``[tokens, kv_heads, width]``; ``heads`` is a multiple of
    ``kv_heads`` and ``lengths``, of which some may be 0, sum to ``tokens``. A token attends to ``window`` tokens before
    and after its own, -1 for all, and with ``causal`` to none after. Returns ``[tokens, heads, width]``.
    """
    band = _band(causal, window)
    parts = []
    for a, b, c in _by_document(q, k, v, lengths):
        a, b, c = (x.transpose(0, 1)[None] for x in (a, b, c))
        parts.append(formula(a, b, c, hidden(a.shape[2], band, q.device))[0].transpose(0, 1))
    return torch.cat(parts)


@op
def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each of ``q [tokens, batch, heads, width]`` to all of ``k``, ``v`` ``[others, batch, heads, width]``.

    Softmax is in fp32 or wider; ``k`` and ``v`` may have fewer heads, of which ``q``'s are a multiple. Returns ``q``'s
    shape.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return formula(q, k, v, None).permute(2, 0, 1, 3)


attention.kept = full_attention.kept = True


# --- the formula


def formula(q: Tensor, k: Tensor, v: Tensor, left_out: Tensor | None) -> Tensor:
    """Return ``softmax(scores(q, k)) v`` for ``[batch, heads, tokens, width]``."""
    return unfold(scores(q, k, left_out).softmax(-1) @ wide(v), q.shape[1]).to(q.dtype)


def scores(q: Tensor, k: Tensor, left_out: Tensor | None) -> Tensor:
    """Return ``q k^T / sqrt(width)`` in fp32 or wider; where ``left_out [rows, columns]`` it is minus infinity.

    ``q`` and ``k`` are ``[batch, heads, tokens, width]``. The rows of q's heads that share one of k follow each other:
    ``[batch, kv_heads, heads / kv_heads * rows, columns]``.
    """
    kv_heads = k.shape[1]
    found = fold(wide(q), kv_heads) @ wide(k).mT / q.shape[-1] ** 0.5
    return found if left_out is None else found.masked_fill(left_out.repeat(q.shape[1] // kv_heads, 1), -torch.inf)


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """Put the rows of heads that share keys one after the other: ``[batch, heads, rows, ...]`` to ``kv_heads``."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).flatten(2, 3)


def unfold(x: Tensor, heads: int) -> Tensor:
    """Undo ``fold``."""
    ratio = heads // x.shape[1]
    return x.unflatten(2, (ratio, x.shape[2] // ratio)).flatten(1, 2)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hidden(tokens: int, band: Band, device: torch.device) -> Tensor | None:
    """Return where of ``[tokens, tokens]`` a token does not attend; None for nowhere."""
    if band == ALL:
        return None
    before, after = (tokens if reach < 0 else reach for reach in band)
    at = torch.arange(tokens, device=device)
    distance = at - at[:, None]
    return (distance > after) | (distance < -before)


def _band(causal: bool, window: Band | None) -> Band:
    before, after = window or ALL
    if min(before, after) < -1:
        raise ValueError(f"window={window}: counts of tokens before and after, or -1 for all")
    return (before, 0) if causal else (before, after)


def _documents(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out empty documents, which moves no token; one stays where there is no other."""
    return tuple(filter(None, lengths)) or (0,)


def _packs(lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None) -> bool:
    """Whether PyTorch's attention would need a mask, or a call for each document."""
    return not _alike(lengths) or _band(causal, window) not in (ALL, CAUSAL)


def _alike(lengths: tuple[int, ...]) -> bool:
    return len(set(_documents(lengths))) == 1


def _by_document(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Any:
    return zip(*(x.split(_documents(lengths)) for x in (q, k, v)), strict=True)


# --- FlashAttention-4, where it is installed: on Hopper it is FlashAttention-3's algorithm (Shah et al. 2024,
# arXiv:2407.08608), compiled when first called. It is an operator here, which compiled blocks take as it is and whose
# result can be kept by its name. Where neither is asked for it is called without PyTorch's dispatcher, which costs the
# host time of its own.


@functools.cache
def _flash() -> Any:
    """Return FlashAttention-4; None where it is not installed, and on devices on which it was not measured.

    Importing it takes seconds.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from flash_attn.cute import interface
    except ImportError:
        return None
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted", UserWarning)  # of its own compiler
    return interface


@torch.compiler.assume_constant_result
def _has_flash() -> bool:
    return _flash() is not None


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention-4 takes q, k and v ``[..., heads, width]``, forward and backward."""
    # Its backward on Hopper lays out q's gradient by widths rounded to 16 and reads it by 32: at 80 it was wrong (b36).
    fits = q.dtype in HALF and q.dtype == k.dtype == v.dtype and q.shape[-1] % 32 == 0 and q.shape[-1] <= 256
    return fits and min(*q.shape, *k.shape) > 0 and _has_flash()


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, before: int, after: int
) -> tuple[Tensor, Tensor]:
    return _flash()._flash_attn_fwd(q, k, v, return_lse=True, **_flash_options(ends, longest, before, after))[:2]  # type: ignore[no-any-return]


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor | None,
    longest: int,
    before: int,
    after: int,
    *,
    beside: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator's results share no memory.
    dq, dk, dv = empty_like_parts((q, k, v)) if beside else (x.new_empty(x.shape) for x in (q, k, v))
    how = _flash_options(ends, longest, before, after)
    same = torch.are_deterministic_algorithms_enabled()
    return _flash()._flash_attn_bwd(q, k, v, out, grad, lse, deterministic=same, dq=dq, dk=dk, dv=dv, **how)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "mindspeed_model::flash_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? ends, SymInt longest, int before, int after) -> (Tensor, Tensor)",
)
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, before: int, after: int
) -> tuple[Tensor, Tensor]:
    """Return attention by FlashAttention-4, and the logarithm of each softmax's denominator, in fp32.

    Operands are ``[batch, tokens, heads, width]``; with ``ends``, where documents end after a first 0, in int32, they
    are ``[tokens, heads, width]`` and ``longest`` is the most tokens of a document. -1 ``before`` or ``after`` is all.
    """
    return _flash_forward(q, k, v, ends, longest, before, after)


@flash_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, before: int, after: int
) -> tuple[Tensor, Tensor]:
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


_flash_backward_operator = torch.library.custom_op(
    "mindspeed_model::flash_attention_backward",
    _flash_backward,
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? ends, SymInt longest, int before, "
        "int after) -> (Tensor, Tensor, Tensor)"
    ),
)


@_flash_backward_operator.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash_options(ends: Tensor | None, longest: int, before: int, after: int) -> dict[str, Any]:
    causal = (before, after) == CAUSAL
    left, right = (None if reach < 0 or causal else reach for reach in (before, after))
    how: dict[str, Any] = {"causal": causal, "window_size_left": left, "window_size_right": right}
    if ends is not None:
        how |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return how


def _flash_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, ends)


def _flash_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_flash_backward_operator(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


def _flash_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _flash_keep(ctx, inputs, output)


flash_attention.register_autograd(_flash_gradients, setup_context=_flash_setup)


class _Flash(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        found = _flash_forward(*inputs)
        _flash_keep(ctx, inputs, found)
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, ends = ctx.saved_tensors
        longest, before, after = ctx.how
        made = _flash_backward(grad, q, k, v, out, lse, ends, longest, before, after, beside=True)
        return *made, None, None, None, None


def _flash_attend(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, before: int, after: int
) -> Tensor:
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return flash_attention(q, k, v, ends, longest, before, after)[0]
    return _Flash.apply(q, k, v, ends, longest, before, after)  # type: ignore[no-any-return]


@attention.on(
    "cuda",
    "flash_attn.cute",
    when="Hopper, with flash-attn-4 installed; fp16, bf16; width a multiple of 32 to 256; documents of unlike lengths, "
    f"a window, or {KEYS} tokens or more each",
    takes=lambda q, k, v, lengths, **how: (
        (_documents(lengths)[0] >= KEYS or _packs(lengths, **how)) and _flash_takes(q, k, v)
    ),
)
def _flash_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    band, lengths = _band(causal, window), _documents(lengths)
    if not _alike(lengths):
        return _flash_attend(q, k, v, _ends(lengths, q.device), max(lengths), *band)
    a, b, c = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v))
    return _flash_attend(a, b, c, None, 0, *band).flatten(0, 1)


@full_attention.on(
    "cuda",
    "flash_attn.cute",
    when=f"Hopper, with flash-attn-4 installed; fp16, bf16; width a multiple of 32 to 256; {KEYS} keys or more",
    takes=lambda q, k, v: len(k) >= KEYS and _flash_takes(q, k, v),
)
def _flash_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return _flash_attend(q, k, v, None, 0, *ALL).transpose(0, 1)


def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where documents end, after a first 0, as kernels for packed documents take it."""
    return devices.send(torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


# --- PyTorch's scaled_dot_product_attention. On Hopper and datacentre Blackwell PyTorch takes cuDNN first from the
# version on (9.15.1, in its wheels since 2.11) that is right for every length; asking for it elsewhere would override
# that judgement, and asking for it there would cost a context per call.


def _takes_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> bool:
    return (
        _packs(lengths, causal=causal, window=window)
        and q.dtype in HALF
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and _varlen() is not None
    )


@functools.cache
def _varlen() -> Any:
    """Return PyTorch's variable-length flash attention; None before 2.11, whose takes no window, and on old devices.

    Importing it takes seconds.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes_windows = "window_size" in inspect.signature(varlen_attn).parameters
    return varlen_attn if takes_windows and torch.cuda.get_device_capability() >= (8, 0) else None


@attention.on(
    "cuda",
    "torch.nn.attention.varlen.varlen_attn",
    when="fp16, bf16; width a multiple of 8 to 256; documents of unlike lengths, or a window",
    takes=_takes_packed,
)
def _packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    lengths = _documents(lengths)
    ends = _ends(lengths, q.device)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    longest = max(lengths)
    return _varlen()(q, k, v, ends, ends, longest, longest, window_size=_band(causal, window))  # type: ignore[no-any-return]


@attention.on("meta", "torch.nn.functional.scaled_dot_product_attention")
@attention.on("cpu", "torch.nn.functional.scaled_dot_product_attention")
@attention.on("cuda", "torch.nn.functional.scaled_dot_product_attention")
def _dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    band = _band(causal, window)
    if _alike(lengths):
        return _equal(q, k, v, len(_documents(lengths)), band)
    return torch.cat([_equal(a, b, c, 1, band) for a, b, c in _by_document(q, k, v, lengths)])


def _equal(q: Tensor, k: Tensor, v: Tensor, documents: int, band: Band) -> Tensor:
    a, b, c = (x.unflatten(0, (documents, len(x) // documents)).transpose(1, 2) for x in (q, k, v))
    causal, left_out = band == CAUSAL, None if band == CAUSAL else hidden(a.shape[2], band, q.device)
    mask = None if left_out is None else ~left_out
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2).flatten(0, 1)


@full_attention.on("meta", "torch.nn.functional.scaled_dot_product_attention")
@full_attention.on("cpu", "torch.nn.functional.scaled_dot_product_attention")
@full_attention.on("cuda", "torch.nn.functional.scaled_dot_product_attention")
def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared).permute(2, 0, 1, 3)


# --- NPU


def npu_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether npu_fusion_attention takes q, k and v ``[..., heads, width]`` of up to a million tokens each."""
    heads, width = q.shape[-2:]
    sizes = width <= 768 and heads <= 256 and min(len(q), len(k)) > 0 and max(len(q), len(k)) <= 2**20
    return sizes and q.dtype in FLOATS and q.dtype == k.dtype == v.dtype


def npu_mask(band: Band, device: torch.device) -> dict[str, Any]:
    """Return the arguments by which npu_fusion_attention leaves out all but a band."""
    if band == ALL:
        return {}
    if band == CAUSAL:
        return {"atten_mask": _triangle(device), "sparse_mode": 3}
    before, after = (_EVERY if reach < 0 else reach for reach in band)
    return {"atten_mask": _triangle(device), "sparse_mode": 4, "pre_tockens": before, "next_tockens": after}


@functools.cache
def _triangle(device: torch.device) -> Tensor:
    """Return the one mask that the operator's compressed modes take, whatever the lengths."""
    with torch.inference_mode(False):  # it is kept, and training saves it for backward
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


@attention.on(
    "npu",
    "npu_fusion_attention npu_fusion_attention_grad",
    when="fp16, bf16, fp32; heads to 256, width to 768; documents of one length",
    takes=lambda q, k, v, lengths, **_: npu_takes(q, k, v) and _alike(lengths),
)
def _npu_equal(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    documents = len(_documents(lengths))
    a, b, c = (x.unflatten(0, (documents, -1)) for x in (q, k, v))
    how = npu_mask(_band(causal, window), q.device)
    out = torch.ops.npu.npu_fusion_attention(a, b, c, q.shape[1], "BSND", scale=q.shape[-1] ** -0.5, **how)[0]
    return out.flatten(0, 1)  # type: ignore[no-any-return]


@attention.on(
    "npu",
    "npu_fusion_attention npu_fusion_attention_grad",
    when="fp16, bf16, fp32; heads to 256, width to 768; to 1024 documents",
    takes=lambda q, k, v, lengths, **_: npu_takes(q, k, v) and len(_documents(lengths)) <= 1024,
)
def _npu_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True, window: Band | None = None
) -> Tensor:
    ends, at = [], 0
    for length in _documents(lengths):
        at += length
        ends.append(at)
    how = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, **npu_mask(_band(causal, window), q.device)}
    return torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[1], "TND", scale=q.shape[-1] ** -0.5, **how)[0]  # type: ignore[no-any-return]


@full_attention.on(
    "npu",
    "npu_fusion_attention npu_fusion_attention_grad",
    when="fp16, bf16, fp32; heads to 256, width to 768; tokens and others to 2^20",
    takes=lambda q, k, v: npu_takes(q, k, v) and q.shape[1] > 0,
)
def _npu_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (x.flatten(2) for x in (q, k, v))
    out = torch.ops.npu.npu_fusion_attention(a, b, c, q.shape[2], "SBH", scale=q.shape[-1] ** -0.5)[0]
    return out.unflatten(2, q.shape[2:])  # type: ignore[no-any-return]
