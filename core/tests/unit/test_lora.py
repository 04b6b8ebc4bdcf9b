"""Adapters: what they compute, whom they are attached to, and what a run of them keeps."""

import math

import pytest
import torch
from mindspeed_model_core import checkpoint, lora, train
from mindspeed_model_core import nn as layers
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.estimate import estimate
from mindspeed_model_core.optim import AdamW
from mindspeed_model_core.parallel import apply, pipeline
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import LoraConfig, OptimConfig, ParallelConfig, Recipe, validate
from mindspeed_model_core.testing import toy
from mindspeed_model_core.trunk import Noise

CPU = Mesh(torch.device("cpu"))


def adapted(**fields):
    with torch.device("meta"):
        net = lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(**fields))
    made = apply.parallelize(net, CPU, ParallelConfig(), precision="fp64")
    apply.initialise(made, seed=3)
    return made


def test_each_stacked_part_has_factors_of_its_own():
    """y = W x + b + alpha / r * B A x, by hand, for the two parts of a stacked projection."""
    torch.manual_seed(0)
    linear = layers.Linear(6, 24, parts=(20, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    plain = linear(x)
    linear.lora = lora.Adapter(linear, LoraConfig(rank=3, alpha=1.5), "layer", Noise()).double()
    for factor in linear.lora.parameters():
        torch.nn.init.normal_(factor)
    a, b = linear.lora.a, linear.lora.b
    assert a.shape == (6, 6) and b.shape == (24, 3)
    update = torch.cat((x @ a[:3].T @ b[:20].T, x @ a[3:].T @ b[20:].T), -1)
    assert torch.allclose(linear(x), plain + 0.5 * update, atol=1e-12)


def test_stacked_parts_without_adapter_stay_as_they_are():
    torch.manual_seed(0)
    linear = layers.Linear(6, 27, parts=(20, 4, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    plain = linear(x)
    linear.lora = lora.Adapter(linear, LoraConfig(rank=3, alpha=1.5), "layer", Noise(), (1,)).double()
    for factor in linear.lora.parameters():
        torch.nn.init.normal_(factor)
    assert linear.lora.a.shape == (3, 6) and linear.lora.b.shape == (4, 3)
    moved = linear(x) - plain
    assert torch.allclose(moved[:, 20:24], 0.5 * x @ linear.lora.a.T @ linear.lora.b.T, atol=1e-12)
    assert not moved[:, :20].any() and not moved[:, 24:].any()


def test_patterns_name_just_what_is_wanted():
    net = toy.Toy(toy.ToyConfig())
    for wanted, names in (
        ({f"blocks.{i}.up": (0, 1) for i in range(4)}, ["up"]),
        ({f"blocks.{i}.up": (1,) for i in range(4)} | {"blocks.2.down": (0,)}, ["up.1", "blocks.2.down"]),
        ({"blocks.0.up": (0,), "blocks.3.up": (0, 1)}, ["blocks.0.up.0", "blocks.3.up"]),
    ):
        assert lora.patterns(net, wanted) == names
        found = lora.targets(net, LoraConfig(targets=tuple(names)))
        assert {name: target.adapted for name, target in found.items()} == wanted


def test_training_begins_at_the_weights_and_moves_adapters_alone():
    made, plain = adapted(rank=2), toy.Toy(toy.ToyConfig()).double()
    plain.load_state_dict({n: p for n, p in made.net.state_dict().items() if not lora.is_factor(n)})
    assert torch.equal(made.net(toy.batch(1)), plain(toy.batch(1)))
    for name, shard in made.shards.items():
        if name.endswith("lora.a"):
            bound = 1 / math.sqrt(shard.shape[1])
            assert bound * 0.5 < shard.master.abs().max() <= bound
    optimizer = AdamW(made, OptimConfig(lr=1e-2))
    before = {name: shard.master.clone() for name, shard in made.shards.items()}
    for step in range(2):
        pipeline.run(made, [toy.batch(step)], lambda out, _: out.sum(), torch.tensor(8.0))
        assert all(shard.gradient is None for name, shard in made.shards.items() if not lora.is_factor(name))
        optimizer.step(1e-2)
        made.gradients.clear()
    for name, shard in made.shards.items():
        assert torch.equal(shard.master, before[name]) != lora.is_factor(name), name


def test_dropout_is_of_the_adapters_input_and_ends_with_training():
    linear = layers.Linear(400, 8, bias=False).double()
    noise = Noise()
    linear.lora = lora.Adapter(linear, LoraConfig(rank=400, dropout=0.25), "layer", noise).double()
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.eye_(linear.lora.a)
    torch.nn.init.ones_(linear.lora.b)
    x = torch.ones(50, 400, dtype=torch.float64)
    dropped = linear(x)
    # Each of 400 ones is dropped or counts 1 / 0.75.
    assert torch.allclose(dropped * 0.75, (dropped * 0.75).round()) and torch.equal(dropped, linear(x))
    for change in ({"seed": 1}, {"name": "other"}):
        vars(noise if "seed" in change else linear.lora).update(change)
        assert not torch.allclose(dropped, dropped := linear(x))
    assert abs(dropped.mean() - 400) < 10
    assert torch.equal(linear.eval()(x), torch.full((50, 8), 400.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ((), {"up", "down", "side"}),
        (("up",), {"up"}),
        (("up.1",), {"up"}),
        (("blocks.*.d*", "side"), {"down", "side"}),
    ],
)
def test_targets_are_names_or_their_ends(targets, wanted):
    net = lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(rank=1, targets=targets))
    found = {name for name, _ in lora.adapters(net)}
    assert found == {f"blocks.{i}.{leaf}" for i in range(4) for leaf in wanted}


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"lora.targets: 'dwon' names no linear layer.*blocks.\*.down"):
        lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(targets=("dwon",)))
    with pytest.raises(UserError, match="parallel.pp=2: stage 1, blocks 2 to 3, has no adapter"):
        lora.check_stages(lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(targets=("blocks.0.up",))), 2)
    with pytest.raises(UserError, match="lora.rank=0: Input should be greater than 0"):
        validate(Recipe, {"preset": "tiny", "lora": {"rank": 0}}, "recipe")
    with pytest.raises(UserError, match="lora.rnak=4: unknown key; did you mean 'rank'"):
        validate(Recipe, {"preset": "tiny", "lora": {"rnak": 4}}, "recipe")


def test_only_a_recipe_with_them_has_another_digest():
    plain = toy.recipe()
    same = toy.recipe(lora=None, optim={"lr": 1e-2, "ema": None})
    assert plain.digest() == same.digest()
    assert len({plain.digest(), toy.recipe(lora={}).digest(), toy.recipe(optim={"lr": 1e-2, "ema": 0.9}).digest()}) == 3


def test_a_base_is_asked_for_unless_speed_is_measured(tmp_path):
    with pytest.raises(UserError, match="init_from: lora trains adapters of given weights"):
        train.run(toy.recipe(lora={}), toy.TOY, tmp_path / "run")
    session = train.Session(toy.recipe(lora={"rank": 2}), toy.TOY, CPU, synthetic=True)
    session.start()
    assert session.step().read()[0] > 0


def test_a_run_keeps_adapters_alone_and_resumes_exactly(tmp_path):
    train.run(toy.recipe(steps=1), toy.TOY, tmp_path / "base")
    fields = {"init_from": str(tmp_path / "base"), "lora": {"rank": 2, "dropout": 0.3}, "recompute": "all"}
    fields["optim"] = {"lr": 1e-2, "schedule": "constant"}
    train.run(toy.recipe(**fields), toy.TOY, tmp_path / "whole")
    train.run(toy.recipe(**fields, steps=2), toy.TOY, tmp_path / "cut")
    train.run(toy.recipe(**fields), toy.TOY, tmp_path / "cut", resume=True)
    one, two = (checkpoint.open_weights(tmp_path / name) for name in ("whole", "cut"))
    assert set(one.names()) == {
        f"blocks.{i}.{x}.lora.{f}" for i in range(4) for x in ("up", "down", "side") for f in "ab"
    }
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())
    assert all(key.split(".", 1)[0] in ("model", "optim") for key in one.metadata.state_dict_metadata)
    # A second run continues them on another base, whose weights are the first run's.
    again = {**fields, "lora": {"rank": 2, "init_from": str(tmp_path / "cut")}}
    session = train.Session(toy.recipe(**again), toy.TOY, CPU)
    session.start()
    assert all(torch.equal(session.parallel.shards[name].master, two.read(name)) for name in two.names())


def test_estimate_counts_what_is_held():
    plain, less = (estimate(toy.recipe(precision="bf16", **c), toy.TOY, 1) for c in ({}, {"lora": {"rank": 2}}))
    factors = 4 * 2 * (2 * 6 + 24 + 20 + 6 + 4 + 6)
    assert (
        less.trainable == factors
        and less.parameters == plain.parameters + factors
        and plain.trainable == plain.parameters
    )
    assert less.memory.weights == 2 * less.parameters
    assert (less.memory.gradients, less.memory.optimizer) == (4 * factors, 12 * factors)
    average = estimate(toy.recipe(precision="bf16", optim={"ema": 0.9}), toy.TOY, 1)
    assert average.memory.optimizer == plain.memory.optimizer + 4 * plain.parameters
    spread = estimate(toy.recipe(lora={"rank": 2}, parallel={"shard": "zero3"}), toy.TOY, 2)
    assert spread.memory.optimizer == 12 * factors // 2


def test_parts_of_an_input_that_is_shared_out():
    """Each rank's rows of A are those of the weight's columns that it holds; the output is one projection."""
    linear = layers.Linear(6, 8, split="in", parts=(2, 4))
    linear.lora = lora.Adapter(linear, LoraConfig(rank=3), "layer", Noise())
    assert linear.projections == (8,) and linear.lora.a.shape == (3, 6) and linear.lora.b.shape == (8, 3)
    for cut in (linear.placements()["weight"], linear.lora.placements()["a"]):
        assert (cut.dim, cut.parts) == (1, (2, 4))
        columns = torch.arange(6).expand(3, 6)
        assert [cut.narrow(columns, rank, 2)[0].tolist() for rank in (0, 1)] == [[0, 2, 3], [1, 4, 5]]


def test_dropout_of_streams_that_ranks_share_out_is_refused():
    net = adapted(rank=2, dropout=0.5).net
    lora.check_dropout(net, cp=2, sequence=True)
    net.streams = True
    lora.check_dropout(net, cp=1, sequence=False)
    for cp, sequence, said in ((2, False, "parallel.cp=2"), (1, True, "parallel.sequence=true")):
        with pytest.raises(UserError, match=said):
            lora.check_dropout(net, cp, sequence)
