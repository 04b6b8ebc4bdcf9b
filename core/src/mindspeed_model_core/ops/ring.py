"""What attention over a ring of devices is made of: attention to a chunk of the keys, its backward, and the merge.

Each device attends from its own queries to the chunks of keys that come by, and merges what it finds (Liu et al. 2023,
arXiv:2310.01889). Activations are ``[tokens, batch, heads, width]``; the logarithm of each softmax's denominator
(``lse``) is ``[batch, heads, tokens]``, in fp32 or wider. These are raw operators without derivatives, for an
autograd.Function to be made of: ``attention_backward`` is one chunk's share of its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import ALL, CAUSAL, HALF, fold, hidden, npu_mask, npu_takes, scores, unfold, wide
from .table import FLOATS, op


@op
@torch.no_grad()
def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend from ``q`` to ``k`` and ``v``, which may have fewer heads; return the output and its ``lse``.

    ``causal``, of as many keys as queries, leaves out the keys after each query's own place. A query without any key
    has output 0 and ``lse`` minus infinity.
    """
    found = scores(_heads_first(q), _heads_first(k), _left_out(q, k, causal))
    lse = found.logsumexp(-1)
    out = (found - lse[..., None]).exp() @ wide(_heads_first(v))
    return _tokens_first(unfold(out, q.shape[2])).to(q.dtype), unfold(lse, q.shape[2])


@op
@torch.no_grad()
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``k`` and ``v`` that follow from ``out``'s.

    ``out`` and ``lse`` may be those of attention to more keys than ``k``, as after merging: the gradients of ``k`` and
    ``v`` are then right, and those of ``q`` are this chunk's share, to be summed (Dao 2023, arXiv:2307.08691, section
    3.1.2, has the formula).
    """
    heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
    found = scores(_heads_first(q), _heads_first(k), _left_out(q, k, causal))
    weights = (found - fold(wide(lse), kv_heads)[..., None]).exp()
    grad, q_wide, out = (fold(wide(_heads_first(x)), kv_heads) for x in (grad, q, out))
    k_wide, v_wide = wide(_heads_first(k)), wide(_heads_first(v))
    slope = weights * (grad @ v_wide.mT - (grad * out).sum(-1, keepdim=True)) / width**0.5
    dq, dk, dv = unfold(slope @ k_wide, heads), slope.mT @ q_wide, weights.mT @ grad
    return _tokens_first(dq).to(q.dtype), _tokens_first(dk).to(k.dtype), _tokens_first(dv).to(v.dtype)


@op
@torch.no_grad()
def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and ``lse`` of attention to both of two chunks of the keys, from those of each.

    At least one of the chunks holds keys for a query; the outputs are of one type, which is kept.
    """
    total = torch.logaddexp(lse, other_lse)
    a, b = ((x - total).exp().permute(2, 0, 1)[..., None] for x in (lse, other_lse))
    return (wide(out) * a + wide(other_out) * b).to(out.dtype), total


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def _tokens_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3)


def _left_out(q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    if causal and len(q) != len(k):
        raise ValueError(f"causal attention has as many keys as queries, not {len(k)} and {len(q)}")
    return hidden(len(q), CAUSAL, q.device) if causal else None


def _fits(q: Tensor, k: Tensor, causal: bool) -> bool:
    return min(*q.shape, *k.shape) > 0 and not (causal and len(q) != len(k))


# --- CUDA: flash attention, which like cuDNN's keeps lse, and unlike it takes no state of a generator for backward


def _flash_takes(q: Tensor, k: Tensor, causal: bool) -> bool:
    return q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _fits(q, k, causal)


@attention_with_lse.on(
    "cuda",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    when="fp16, bf16; width a multiple of 8 to 256",
    takes=lambda q, k, v, causal: _flash_takes(q, k, causal),
)
@torch.no_grad()
def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    a, b, c = (_heads_first(x) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(a, b, c, 0.0, causal)
    return _tokens_first(out), lse


@attention_backward.on(
    "cuda",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward",
    when="fp16, bf16; width a multiple of 8 to 256; lse in fp32",
    takes=lambda grad, q, k, v, out, lse, causal: _flash_takes(q, k, causal) and lse.dtype == torch.float32,
)
@torch.no_grad()
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g, a, b, c, o = (_heads_first(x) for x in (grad, q, k, v, out))
    unseeded = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    made = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g, a, b, c, o, lse.contiguous(), None, None, len(q), len(k), 0.0, causal, *unseeded
    )
    dq, dk, dv = (_tokens_first(x) for x in made)
    return dq, dk, dv


# --- NPU: the softmax's statistics are its maximum and sum, 8 times each; lse and 1 are such a pair as well


def _npu_takes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    return npu_takes(q, k, v) and _fits(q, k, causal)


def _statistics(lse: Tensor) -> tuple[Tensor, Tensor]:
    largest = lse[..., None].expand(*lse.shape, 8).contiguous()
    return largest, torch.ones_like(largest)


@attention_with_lse.on(
    "npu",
    "npu_fusion_attention",
    when="fp16, bf16, fp32; heads to 256, width to 768",
    takes=lambda q, k, v, causal: _npu_takes(q, k, v, causal),
)
@torch.no_grad()
def _npu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    a, b, c = (x.flatten(2) for x in (q, k, v))
    how = npu_mask(CAUSAL if causal else ALL, q.device)
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(
        a, b, c, q.shape[2], "SBH", scale=q.shape[-1] ** -0.5, **how
    )
    return out.unflatten(2, q.shape[2:]), largest[..., 0] + total[..., 0].log()


@attention_backward.on(
    "npu",
    "npu_fusion_attention_grad",
    when="fp16, bf16, fp32; heads to 256, width to 768; lse in fp32",
    takes=lambda grad, q, k, v, out, lse, causal: _npu_takes(q, k, v, causal) and lse.dtype == torch.float32,
)
@torch.no_grad()
def _npu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    largest, total = _statistics(lse)
    a, b, c, g, o = (x.flatten(2) for x in (q, k, v, grad, out))
    how = npu_mask(CAUSAL if causal else ALL, q.device)
    made = torch.ops.npu.npu_fusion_attention_grad(
        a, b, c, g, q.shape[2], "SBH",
        softmax_max=largest, softmax_sum=total, attention_in=o, scale_value=q.shape[-1] ** -0.5, **how,
    )  # fmt: skip
    dq, dk, dv = (x.unflatten(2, like.shape[2:]) for x, like in zip(made[:3], (q, k, v), strict=True))
    return dq, dk, dv


@merge_attention.on(
    "npu",
    "npu_ring_attention_update",
    when="fp16, bf16, fp32; lse in fp32",
    takes=lambda out, lse, other_out, other_lse: (
        out.numel() > 0 and out.dtype in FLOATS and lse.dtype == other_lse.dtype == torch.float32
    ),
)
@torch.no_grad()
def _npu_merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    before, now = (out.flatten(2), *_statistics(lse)), (other_out.flatten(2), *_statistics(other_lse))
    made, largest, total = torch.ops.npu.npu_ring_attention_update(*before, *now, input_layout="SBH")
    return made.unflatten(2, out.shape[2:]), largest[..., 0] + total[..., 0].log()
