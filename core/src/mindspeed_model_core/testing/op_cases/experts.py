"""Mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .case import Case, draw


def _one_hot(counts: Tensor, like: Tensor) -> Tensor:
    """Return ``[rows, experts]``, 1 where a row is of an expert."""
    ends = counts.cumsum(0)
    rows = torch.arange(len(like))[:, None]
    return ((rows < ends) & (rows >= ends - counts)).to(like.dtype)


def _grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.einsum("ri,eio,re->ro", x, weight, _one_hot(counts, x))


def _product(name: str, counts: tuple[int, ...], width: int, out: int, reference_on: tuple[str, ...] = ()) -> Case:
    weight = draw(len(counts), width, out, seed=1) / width**0.5
    operands = (draw(sum(counts), width), weight)
    return Case(ops.grouped_matmul, name, operands, _grouped_matmul, (torch.tensor(counts),), reference_on=reference_on)


def _places(experts: Tensor) -> Tensor:
    """Count for each choice the ones that come before it: those of a lower expert, and earlier ones of its own."""
    flat, number = experts.flatten(), torch.arange(experts.numel())
    before = (flat < flat[:, None]) | ((flat == flat[:, None]) & (number < number[:, None]))
    return before.sum(1)


def _sent(places: Tensor, like: Tensor) -> Tensor:
    """Return ``[choice, row]``, 1 where a choice has its row."""
    return (places[:, None] == torch.arange(len(places))).to(like.dtype)


def _permute(tokens: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    places = _places(experts)
    copies = tokens[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)
    return _sent(places, tokens).T @ copies, places


def _unpermute(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return ((_sent(places, rows) @ rows).view(*weights.shape, -1) * weights[..., None]).sum(1)


def _choices(tokens: int, k: int, experts: int) -> Tensor:
    """Return ``[tokens, k]`` experts, differing within a token, never the last but one."""
    chosen = draw(tokens, experts, seed=2)
    chosen[:, -2] = -torch.inf
    return chosen.topk(k, -1).indices


def _there(name: str, tokens: int, k: int, experts: int, width: int, dtype: torch.dtype = torch.int64) -> Case:
    choices = _choices(tokens, k, experts).to(dtype)
    return Case(ops.permute_tokens, name, (draw(tokens, width),), _permute, (choices,))


def _back(name: str, tokens: int, k: int, width: int) -> Case:
    places = _places(_choices(tokens, k, 5)).to(torch.int32)
    rows, weights = draw(tokens * k, width), draw(tokens, k, seed=3).sigmoid()
    return Case(ops.unpermute_tokens, name, (rows, places, weights), _unpermute)


NOBODY = torch.zeros(0, 2, dtype=torch.int64)
CASES = (
    _product("even", (16, 16, 16, 16), 64, 32),
    _product("empty experts", (0, 33, 0, 1, 30, 0), 64, 80),
    _product("odd widths", (5, 0, 2), 7, 13, reference_on=("cuda",)),
    _product("all in the last", (0, 0, 19), 8, 24),
    _product("one expert", (9,), 8, 16, reference_on=("npu",)),
    _product("no rows", (0, 0, 0), 8, 16, reference_on=("npu", "cuda")),
    _there("one each", 9, 1, 4, 6),
    _there("two each", 33, 2, 5, 7),
    _there("int32", 12, 3, 8, 16, torch.int32),
    Case(ops.permute_tokens, "no tokens", (draw(0, 6),), _permute, (NOBODY,), reference_on=("npu",)),
    _back("one each", 9, 1, 6),
    _back("two each", 33, 2, 7),
    _back("one token", 1, 3, 16),
)
