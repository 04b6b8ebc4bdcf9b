"""How often attention runs where blocks are computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import nn as layers
from .. import ops
from ..trunk import Batch, Context, State, Trunk
from .tolerance import assert_close

LENGTHS = {"alike": (6, 6), "unlike": (1, 9, 2)}
"""Of documents: devices serve those of one length and those of several by different operators."""
BLOCKS = 4


class Counted(TorchDispatchMode):
    """Names the operators of some that really run: a kept result does not reach the dispatcher."""

    def __init__(self, names: frozenset[str] = ops.ATTENTION) -> None:
        super().__init__()
        self.names = names
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if func.name() in self.names:
            self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


class Attending(Trunk):
    """Blocks that do little but attend: to documents, then to all tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers.Linear(width, 3 * width) for _ in range(BLOCKS))

    def context(self, batch: Batch) -> Context:
        """Return the lengths of documents."""
        return {"lengths": batch["lengths"]}

    def embed(self, batch: Batch, context: Context) -> State:
        """Return the features as they are."""
        return {"x": batch["x"]}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block on ``[tokens, width]``."""
        q, k, v = block(state["x"]).unflatten(-1, (2, -1)).chunk(3, -1)
        y = ops.attention(q, k, v, context["lengths"])
        z = ops.full_attention(*(x[:, None] for x in (y, k, v)))
        return {"x": state["x"] + z.flatten(1)}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return the features as they are."""
        return state["x"]

    def tokens(self, batch: Batch) -> int:
        """Return the rows."""
        return len(batch["x"])

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the features' shape."""
        return {"x": tuple(batch["x"].shape)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Draw everything from a normal."""
        weight.normal_(0, 0.1, generator=generator)


def attend(
    documents: str, recompute: bool, keep: str, device: torch.device, dtype: torch.dtype
) -> tuple[int, int, dict[str, Tensor]]:
    """Run the blocks forward and backward; return how often attention and products ran, and gradients, on the CPU."""
    torch.manual_seed(0)
    net = Attending()
    net.recompute, net.recompute_keep = BLOCKS * recompute, keep
    x = torch.randn(sum(LENGTHS[documents]), 64).to(device, dtype).requires_grad_()
    net = net.to(device, dtype)
    with Counted() as counted, Counted(ops.PRODUCTS) as products:
        net({"x": x, "lengths": LENGTHS[documents]}).square().sum().backward()  # type: ignore[union-attr]
    grads = {name: p.grad for name, p in (("x", x), *net.named_parameters())}
    cpu = {name: grad.cpu() for name, grad in grads.items() if grad is not None}
    return len(counted.calls), len(products.calls), cpu


def check_kept(documents: str, device: torch.device, dtype: torch.dtype, bound: float = 0.0) -> None:
    """What is kept runs once, what is computed again twice, and gradients are within ``bound``."""
    once, products, plain = attend(documents, False, "nothing", device, dtype)
    assert once and len(plain) == 1 + 2 * BLOCKS
    # Of a block's products one is in forward.
    for keep, ran in {
        "nothing": (2 * once, products + BLOCKS),
        "attention": (once, products + BLOCKS),
        "products": (once, products),
    }.items():
        *found, got = attend(documents, True, keep, device, dtype)
        assert tuple(found) == ran, (keep, found, ran)
        assert_close(got, plain, bound)
