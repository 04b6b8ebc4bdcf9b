"""Gradients of weights are added up in the master's type: by the layer, not rounded on the way."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mindspeed_model_core import lora, ops
from mindspeed_model_core.parallel import apply, pipeline
from mindspeed_model_core.parallel import shard as shard_module
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import LoraConfig, ParallelConfig
from mindspeed_model_core.testing import toy
from torch import Tensor

layer = sys.modules["mindspeed_model_core.ops.linear"]  # the package has a function of that name
CONFIG = toy.ToyConfig(blocks=2, width=16, hidden=32)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _layer(weight: Tensor, total: Tensor | None) -> Tensor:
    weight = weight.clone().requires_grad_()
    if total is not None:
        ops.accumulate_gradient(weight, total)
    return weight


@pytest.mark.parametrize("leading", [(5,), (5, 3), (0,)])
def test_the_rest_of_a_layer_is_as_ever(leading: tuple[int, ...]) -> None:
    total = torch.ones(6, 4)
    found = []
    for weight in (_layer(draw(6, 4), total), _layer(draw(6, 4), None)):
        x, bias = draw(*leading, 4).requires_grad_(), draw(6).requires_grad_()
        y = ops.linear(x, weight, bias)
        y.backward(draw(*leading, 6, seed=3))
        found.append((y.detach(), x.grad, bias.grad, weight.grad))
    (*ours, none), (*theirs, grad) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert none is None and torch.allclose(total - 1, grad.float(), atol=0.05)


def test_a_weight_that_two_layers_share_gets_both() -> None:
    """By a layer twice and by what knows nothing of it once, as a table of embeddings that is also the head."""
    total = torch.zeros(6, 4)
    weight = _layer(draw(6, 4), total)
    x, ids = draw(5, 4), torch.tensor([0, 3])
    (ops.linear(x, weight).sum() + ops.linear(2 * x, weight).sum() + F.embedding(ids, weight).sum()).backward()
    assert torch.equal(weight.grad, F.one_hot(ids, 6).sum(0)[:, None].expand(6, 4).bfloat16())  # type: ignore[arg-type]
    assert torch.allclose(total, 3 * x.float().sum(0).expand(6, 4), rtol=1e-6)


def test_level_zero_and_inference_leave_it_to_autograd() -> None:
    total = torch.zeros(6, 4)
    weight = _layer(draw(6, 4), total)
    with ops.at_level(0):
        ops.linear(draw(5, 4), weight).sum().backward()
    assert weight.grad is not None and not total.any()
    with torch.no_grad():
        assert not ops.linear(draw(5, 4), weight).requires_grad


def gradients(precision: Any, level: int = 2, *, adapted: bool = False, recompute: str = "none") -> dict[str, Tensor]:
    """Return a step's accumulated gradients over six micro-batches, from the same bf16 values in any type."""
    with torch.device("meta"):
        net = toy.Toy(CONFIG)
        net = lora.attach(net, LoraConfig(rank=3)) if adapted else net
    made = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision=precision, recompute=recompute)
    for number, shard in enumerate(made.shards.values()):
        shard.write(draw(*shard.shape, seed=number).to(shard.master.dtype) * 0.3)
    with ops.at_level(level):
        batches = [toy.batch(i, rows=64) for i in range(6)]
        pipeline.run(made, batches, lambda out, _: out.sum(), torch.tensor(1.0))
    made.gradients.reduce()
    return {name: s.gradient.double() for name, s in made.shards.items() if s.trainable}  # type: ignore[union-attr]


def error(got: dict[str, Tensor], want: dict[str, Tensor], name: str) -> float:
    return float((got[name] - want[name]).norm() / want[name].norm())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_steps_gradients_are_the_true_ones_to_the_precision_of_its_layers(adapted: bool) -> None:
    truth, now = gradients("fp64", adapted=adapted), gradients("bf16", adapted=adapted)
    assert truth.keys() == now.keys() and all(error(now, truth, name) < 0.05 for name in truth)
    assert not adapted or all("lora" in name for name in now)  # what is frozen has none


def test_a_step_adds_up_its_products_without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is here the sum in fp64 of the products of the very operands that the layers had."""
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    real = layer.accumulate_product_

    def logged(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        seen.setdefault((total.data_ptr(), *total.shape), []).append(a.double().T @ b.double())
        return real(total, a, b)

    monkeypatch.setattr(layer, "accumulate_product_", logged)
    now, before = gradients("bf16", 2), gradients("bf16", 0)
    layers = [n for n in now if n.endswith(("up.weight", "down.weight", "side.weight", "head.weight"))]
    assert len(layers) == len(seen) == 7 and all(len(products) == 6 for products in seen.values())
    for name in now:
        if name not in layers:
            assert torch.equal(now[name], before[name]), name
    # The buffers lie one after another, in the order of the parameters.
    truth = {name: torch.stack(seen[place]).sum(0) for name, place in zip(layers, sorted(seen), strict=True)}
    for name in layers:
        assert error(now, truth, name) < 1e-6 < 1e-4 < error(before, truth, name) < 1e-2, name


def test_recomputation_changes_nothing() -> None:
    plain, again = gradients("bf16"), gradients("bf16", recompute="all")
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp64", 1e-12), ("bf16-pure", 2e-2)])
def test_in_one_type_layers_add_to_the_first_gradient(
    precision: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "SUMMING", ("cpu",))
    with torch.device("meta"):
        net = toy.Toy(CONFIG)
    made = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision=precision)
    for number, shard in enumerate(made.shards.values()):
        shard.write(draw(*shard.shape, seed=number).to(shard.master.dtype))
    weights = [shard.parameter for shard in made.shards.values() if shard.parameter.dim() > 1]
    sums = [layer.accumulator(weight) for weight in weights]
    assert all(total.tensor is None for total in sums)
    pipeline.run(made, [toy.batch(0)], lambda out, _: out, torch.tensor(1.0))
    assert all(total.tensor is weight.grad is not None for total, weight in zip(sums, weights, strict=True))
    made.gradients.clear()
    assert all(total.tensor is weight.grad is None for total, weight in zip(sums, weights, strict=True))
    plain, fused = gradients(precision, 0), gradients(precision, 2)
    assert all(error(fused, plain, name) < bound for name in plain)


def test_in_one_type_there_is_no_pass_to_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "SUMMING", ("cpu",))
    real, made = layer.accumulate_product_, []
    monkeypatch.setattr(layer, "accumulate_product_", lambda *each: made.append(each) or real(*each))
    gradients("fp32")
    assert len(made) == 7 * 5  # layers, and micro-batches after the first
