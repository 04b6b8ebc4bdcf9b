"""A linear layer that tensor parallelism may cut along its output or its input."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.linear import Sum, accumulator, weight_gradient
from ..parallel.placement import Placement
from ..parallel.tensor import TensorParallel


class Linear(nn.Linear):
    """``y = x W^T + b``. ``split="out"`` shares out output features, ``split="in"`` input features, None neither.

    ``parts`` are sizes of what is stacked along the cut side, each shared out on its own: projections in the output (q,
    k, v), or in the input what several layers made; ``unit`` is the smallest block that must stay whole, such as a
    head's width. Sequence parallelism shares out the tokens of the
    input, unless ``tokens="all"``: then every rank has them all, as of a text that is short beside a video. With
    ``tokens="none"`` the input has none, as a time step's, but what follows works on this rank's. An input wider than
    the weights, as fp32 beside bf16, is computed with in its own dtype where nothing is shared out. ``lora`` is an
    adapter, once one is attached.
    """

    tp: TensorParallel | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        split: Literal["out", "in"] | None = None,
        parts: tuple[int, ...] = (),
        unit: int = 1,
        tokens: Literal["own", "all", "none"] = "own",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.split, self.parts, self.unit, self.tokens = split, parts, unit, tokens
        self.lora: nn.Module | None = None

    def placements(self) -> dict[str, Placement]:
        """Return where each parameter's elements live."""
        if self.split == "out":
            cut = Placement(0, self.parts, self.unit)
            return {"weight": cut, "bias": cut}
        replica = Placement(partial=self._shares_tokens)
        if self.split == "in":
            return {"weight": Placement(1, self.parts, self.unit), "bias": replica}
        return {"weight": replica, "bias": replica}

    @property
    def projections(self) -> tuple[int, ...]:
        """Return the sizes of the projections stacked in the output."""
        return self.parts if self.parts and self.split != "in" else (self.out_features,)

    @property
    def _shares_tokens(self) -> bool:
        return self.tp is not None and self.tp.sequence and self.tokens != "all"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, ..., in]`` to ``[tokens, ..., out]``; under TP one of the two is this rank's share."""
        return ops.keeping(self._map, x)

    def _map(self, x: Tensor) -> Tensor:
        if self.lora is None:
            return self._project(x)
        added = self.lora(x)
        if (self.tp is None or self.split is None) and x.dtype == self.weight.dtype:
            return ops.adapted_linear(x, self.weight, self.offset(), *added)
        return ops.add_low_rank(self._project(x), *added)

    def offset(self) -> Tensor | None:
        """Return what is added to each of the output's features held here."""
        return self.bias

    def _project(self, x: Tensor) -> Tensor:
        bias = self.offset()
        if self.tp is None or self.split is None:
            if x.dtype != self.weight.dtype == torch.bfloat16:
                return _Wide.apply(x, self.weight, bias, accumulator(self.weight))
            return ops.linear(x, self.weight, bias)
        if self.split == "out":
            return self.tp.column(x, self.weight, bias, self._shares_tokens)
        return self.tp.row(x, self.weight, bias, self._shares_tokens)


class _Wide(torch.autograd.Function):
    """A linear map in the input's dtype; the weights' copies in it live no longer than each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Sum | None) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_weight = weight_gradient(ctx.total, rows, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return (
            grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None,
            None if to_weight is None else to_weight.to(weight.dtype),
            rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None,
            None,
        )
