"""Mixtures of experts: matrix products by group, and tokens sorted by expert and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators import reference, require, rule


def _ends(groups: Tensor | Sequence[int], kind: int) -> list[int]:
    """Return where each group ends; kind 0 lists the ends, kind 1 the sizes."""
    values = torch.as_tensor(groups)
    return (values.cumsum(0) if kind == 1 else values).tolist()


# --- matrix products


@rule("npu_grouped_matmul", "npu_grouped_matmul.List")
def _check_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    group_list: Tensor | list[int] | None = None,
    group_type: int | None = None,
    group_list_type: int = 0,
    **_: object,
) -> None:
    require(len(x) <= 128 and len(weight) <= 128, "lists have at most 128 tensors")
    require(len({t.dtype for t in (*x, *weight)}) == 1, "x and weight have one type")
    if isinstance(group_list, Tensor):
        require(group_list.dtype == torch.int64, f"group_list is int64, not {group_list.dtype}")
        require(group_list_type == 0 or len(group_list) != 1, "a group_list of sizes has more than one")
    widest = max(t.shape[-1] for t in (*x, *weight))
    require(widest < 65536, f"the last dim of x and weight is below 65536, not {widest}")
    if group_type != 0 or len(x) != 1:
        return
    if len(weight) == 1:
        shapes = f"x {tuple(x[0].shape)}, weight {tuple(weight[0].shape)}"
        require(weight[0].dim() == 3 and x[0].shape[-1] == weight[0].shape[-2], f"{shapes}: K agrees")
    if group_list is not None:
        ends = _ends(group_list, group_list_type)
        require(ends == sorted(ends) and ends[-1] <= len(x[0]), f"groups end in order within {len(x[0])} rows: {ends}")
        experts = weight[0].shape[0] if len(weight) == 1 else len(weight)
        require(len(ends) == experts, f"group_list has {len(ends)} groups for {experts} weights")


@reference("npu_grouped_matmul", "npu_grouped_matmul.List")
def _grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor] | None = None,
    group_list: Tensor | list[int] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
) -> list[Tensor]:
    """Each group of rows (type 0) times its weight, or of columns (type 2): the gradient of the weights."""
    dtype = x[0].dtype

    def product(a: Tensor, b: Tensor, number: int) -> Tensor:
        out = a.float() @ b.float()
        if bias:
            out = out + (bias[number] if len(bias) > 1 or bias[0].dim() == 1 else bias[0][number]).float()
        return out.to(dtype)

    if group_list is None:
        return [product(a, b, i) for i, (a, b) in enumerate(zip(x, weight, strict=True))]
    ends = _ends(group_list, group_list_type)
    groups = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    if group_type == 2:
        return [torch.stack([product(x[0][:, g], weight[0][g], i) for i, g in enumerate(groups)])]
    if len(x) != 1:
        raise NotImplementedError("grouped matmul of several x with a group_list has no reference")
    weights = list(weight[0]) if len(weight) == 1 and weight[0].dim() == 3 else weight
    parts = [product(x[0][g], w, i) for i, (g, w) in enumerate(zip(groups, weights, strict=True))]
    if split_item not in (2, 3):
        return parts
    rest = x[0].new_zeros(len(x[0]) - ends[-1], weights[0].shape[-1])  # rows after the last group
    return [torch.cat((*parts, rest))]


@rule("npu_grouped_matmul_add_")
def _check_grouped_matmul_add(
    input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, group_type: int = 2, **_: object
) -> None:
    halves = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    require(input.dtype == torch.float32 and halves, "the sum is fp32 and both operands are fp16 or bf16")
    require(group_type == 2, f"group_type is 2, not {group_type}")
    require(x.dim() == weight.dim() == 2 and len(x) == len(weight), "both operands have 2 dims and as many rows")
    require(max(x.shape[1], weight.shape[1]) < 65536, f"widths {x.shape[1]}, {weight.shape[1]} are below 65536")
    require(group_list.dtype == torch.int64 and len(group_list) <= 1024, "group_list is int64, of at most 1024 groups")
    shape = (len(group_list), x.shape[1], weight.shape[1])
    require(tuple(input.shape) == shape, f"the sum is [groups, M, N], {shape}, not {tuple(input.shape)}")


@reference("npu_grouped_matmul_add_")
def _grouped_matmul_add(
    input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, group_type: int = 2, group_list_type: int = 0
) -> Tensor:
    ends = _ends(group_list, group_list_type)
    total = input.view(len(ends), -1, weight.shape[-1])
    for number, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
        total[number] += x[a:b].float().t() @ weight[a:b].float()
    return input


# --- tokens, one row for each expert they go to; sorted_indices says where a row went


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Return the row at each place; zeros where the row was dropped."""
    out = tokens.new_zeros(len(places), tokens.shape[-1])
    kept = places < len(tokens)
    out[kept] = tokens[places[kept]]
    return out


@rule("npu_moe_token_permute")
def _check_permute(tokens: Tensor, indices: Tensor, padded_mode: bool = False, **_: object) -> None:
    require(tokens.dim() == 2 and indices.dim() in (1, 2), "tokens have 2 dims, indices 1 or 2")
    require(indices.dtype in (torch.int32, torch.int64), f"indices are int32 or int64, not {indices.dtype}")
    require(len(indices) == len(tokens), f"one row of indices for each of {len(tokens)} tokens, not {len(indices)}")
    require(not padded_mode, "padded_mode is false")


@reference("npu_moe_token_permute")
def _permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    order = indices.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    kept = order[:num_out_tokens] if num_out_tokens else order
    return tokens[kept // (indices.numel() // max(len(indices), 1) or 1)], places.to(torch.int32)


@reference("npu_moe_token_permute_grad_v2")
def _permute_grad(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int
) -> Tensor:
    rows = _rows(grad_permuted_tokens.float(), sorted_indices.long())
    return rows.view(-1, int(num_topK), rows.shape[-1]).sum(1).to(grad_permuted_tokens.dtype)


@rule("npu_moe_token_unpermute", "_npu_moe_token_unpermute")
def _check_unpermute(sorted_indices: Tensor, probs: Tensor | None = None, **_: object) -> None:
    require(sorted_indices.dtype == torch.int32, f"sorted_indices are int32, not {sorted_indices.dtype}")
    if probs is not None:
        require(probs.dim() == 2 and probs.numel() == sorted_indices.numel(), "one probability for each row")


@reference("npu_moe_token_unpermute")
def _unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    rows = _rows(permuted_tokens.float(), sorted_indices.long())
    rows = rows.view(-1, 1 if probs is None else probs.shape[1], rows.shape[-1])
    if probs is not None:
        rows = rows * probs.float()[..., None]
    return rows.sum(1).to(permuted_tokens.dtype)


@reference("_npu_moe_token_unpermute")
def _unpermute_for_backward(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the public operator's derivative calls; the second result is kept for the probabilities' gradient."""
    kept = None if probs is None else permuted_tokens.clone()
    return _unpermute(permuted_tokens, sorted_indices, probs), kept


@reference("npu_moe_token_unpermute_grad_v2")
def _unpermute_grad(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    grad, places = grad_unpermuted_tokens.float(), sorted_indices.long()
    share = torch.ones(len(grad), 1) if probs is None else probs.float()
    rows = (grad[:, None] * share[..., None]).flatten(0, 1)
    out = torch.zeros(int(permuted_tokens_size_0), grad.shape[-1])
    kept = places < len(out)
    out[places[kept]] = rows[kept]
    if probs is None or permuted_tokens is None:
        return out.to(permuted_tokens_dtype), None
    tokens = _rows(permuted_tokens.float(), places).view(*probs.shape, -1)
    return out.to(permuted_tokens_dtype), (tokens * grad[:, None]).sum(-1).to(probs.dtype)


@reference("npu_moe_gating_top_k_softmax")
def _gating(x: Tensor, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    values, chosen = x.float().softmax(-1).topk(k, -1)
    rows = torch.arange(len(x))[:, None] + torch.arange(k) * len(x)
    return values.to(x.dtype), chosen.to(torch.int32), rows.to(torch.int32)
