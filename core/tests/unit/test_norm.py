"""The layer that adds and normalises gives, bit for bit, what the sum and the norm give in turn."""

from types import SimpleNamespace

import pytest
import torch
from mindspeed_model_core import nn as layers
from torch import Tensor


def _rms(*, shared: bool) -> layers.RMSNorm:
    norm = layers.RMSNorm(6, 1e-5, unit=2 if shared else None)
    if shared:  # the other ranks' squares add up to twice this one's
        norm.tp, norm.width = SimpleNamespace(sum_features=lambda square: 3 * square), 12  # type: ignore[assignment]
    return norm


@pytest.mark.parametrize(
    "norm",
    [_rms(shared=False), _rms(shared=True), layers.LayerNorm(6)],
    ids=["whole", "features shared out", "layer norm"],
)
def test_a_norm_of_a_sum(norm: layers.RMSNorm | layers.LayerNorm) -> None:
    learnt = tuple(norm.parameters())
    for number, weight in enumerate(learnt):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1 + number))
    generator = torch.Generator().manual_seed(0)
    x, residual, *grads = (torch.randn(4, 6, generator=generator, requires_grad=n < 2) for n in range(4))

    def learn(outs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (*outs, *torch.autograd.grad(outs, (x, residual, *learnt), grads))

    total = x + residual
    want = learn((norm(total), total))
    assert all(torch.equal(a, b) for a, b in zip(learn(norm.add(x, residual)), want, strict=True))


def test_a_norm_of_heads_is_partial_wherever_heads_are_shared_out() -> None:
    """Ranks see the gradients of their own heads alone, in sequence parallelism and without it."""
    norm = layers.HeadNorm(4, 1e-6)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert not norm.placements()["weight"].partial
    norm.tp = SimpleNamespace(sequence=False)  # type: ignore[assignment]
    assert norm.placements()["weight"].partial and norm.placements()["weight"].dim is None
