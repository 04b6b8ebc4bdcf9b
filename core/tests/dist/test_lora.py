"""Adapters on the toy under every layout: gradients, clipped steps and checkpoints equal the single process's."""

import json

import pytest
import torch
from mindspeed_model_core import checkpoint, lora, train
from mindspeed_model_core.optim import AdamW
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import LoraConfig, OptimConfig, ParallelConfig
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.equivalence import Job, assert_equivalent, trace
from mindspeed_model_core.testing.tolerance import FP64

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2-sequence": (2, {"tp": 2, "sequence": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "dp2-zero1": (2, {"shard": "zero1"}),
    "dp2-zero2": (2, {"shard": "zero2"}),
    "dp2-zero3": (2, {"shard": "zero3"}),
    "dp8-zero3": (8, {"shard": "zero3"}),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}),
    "tp2-sequence-pp2-dp2-zero3": (8, {"tp": 2, "sequence": True, "pp": 2, "shard": "zero3"}),
}


def job(**fields):
    config = LoraConfig(**{"rank": 3, "alpha": 5.0, **fields})
    return Job(
        build=lambda: lora.attach(toy.Toy(toy.ToyConfig()), config),
        task=toy.ToyTask(toy.recipe(), toy.ToyConfig()),
        batches=lambda step: [toy.batch(8 * step + i) for i in range(8)],
    )


@pytest.fixture(autouse=True)
def both_factors_random(monkeypatch):
    """B begins at zero, and A then has no gradient in the first step."""
    monkeypatch.setattr(lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.3, generator=generator))


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name):
    world, fields = LAYOUTS[name]
    assert_equivalent(job(), world, fields, FP64)


@pytest.mark.parametrize("fields", [{"tp": 2}, {"tp": 2, "sequence": True}, {"shard": "zero3"}])
def test_some_of_the_projections_that_a_layer_stacks(fields):
    for targets in (("up.0", "down"), ("up.1", "side")):
        assert_equivalent(job(targets=targets), 2, fields, FP64)


@pytest.mark.parametrize("fields", [{"tp": 2, "sequence": True}, {"shard": "zero2"}, {"pp": 2}])
@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_recomputed_blocks_of_frozen_inputs_learn(fields, keep):
    plain = job(targets=("up", "blocks.*.side"))
    again = Job(plain.build, plain.task, plain.batches, recompute="all", recompute_keep=keep)
    assert_equivalent(again, 2, fields, FP64)
    assert trace(again, {}).losses == trace(plain, {}).losses


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", ["tp2", "tp2-sequence", "pp2", "tp2-sequence-pp2"])
def test_dropout_is_the_same_under_every_layout(name, recompute):
    world, fields = {**LAYOUTS, "tp2-sequence-pp2": (4, {"tp": 2, "sequence": True, "pp": 2})}[name]
    plain = job(dropout=0.4)
    drop = Job(plain.build, plain.task, _seeded)
    once = trace(drop, {})
    assert_equivalent(Job(plain.build, plain.task, _seeded, recompute=recompute), world, fields, FP64)
    assert trace(Job(plain.build, plain.task, _seeded, recompute="all"), {}).norms == once.norms
    assert once.losses != trace(Job(job().build, plain.task, _seeded), {}).losses


def _seeded(step):
    torch.manual_seed(step)
    return [toy.batch(4 * step + i) for i in range(4)]


def _seeds(fields):
    recipe = toy.recipe(lora={"rank": 2, "dropout": 0.5}, parallel=fields)
    session = train.Session(recipe, toy.TOY, open_mesh(recipe.parallel, torch.device("cpu")), synthetic=True)
    session.start()
    session.step()
    return torch.initial_seed(), session.parallel.net.noise.seed


def test_random_numbers_are_those_of_a_data_rank():
    """Ranks of one sample draw alike, data ranks each their own."""
    for fields, different in (({}, 2), ({"tp": 2}, 1), ({"pp": 2}, 1)):
        assert len(set(run_dist(_seeds, 2, fields))) == different


def _frozen(fields, precision):
    parallel = ParallelConfig(**fields)
    mesh = open_mesh(parallel, torch.device("cpu"))
    with torch.device("meta"):
        net = lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(rank=2))
    made = apply.parallelize(net, mesh, parallel, precision=precision)
    optimizer = AdamW(made, OptimConfig())
    for name, shard in made.shards.items():
        if not lora.is_factor(name):
            assert shard.master.data_ptr() == shard.local.data_ptr()
            assert shard.local.dtype == apply.COMPUTE[precision]
            assert shard.buffer is None and not shard.trainable
    return sum(s.master.numel() for s in optimizer.shards), {str(s.master.dtype) for s in optimizer.shards}


@pytest.mark.parametrize("fields", [{}, {"shard": "zero1"}, {"shard": "zero3"}, {"tp": 2}], ids=str)
def test_what_is_frozen_costs_its_weights_alone(fields):
    net = lora.attach(toy.Toy(toy.ToyConfig()), LoraConfig(rank=2))
    whole = sum(p.numel() for name, p in net.named_parameters() if lora.is_factor(name))
    for size, dtypes in run_dist(_frozen, 2, fields, "bf16"):
        assert size <= whole and dtypes == {"torch.float32"}


def _losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fields", [{"tp": 2, "sequence": True}, {"pp": 2}, {"shard": "zero3"}], ids=str)
def test_resumes_under_other_layouts(tmp_path, fields):
    train.run(toy.recipe(steps=1, precision="fp64"), toy.TOY, tmp_path / "base")
    common = {
        "precision": "fp64",
        "init_from": str(tmp_path / "base"),
        "lora": {"rank": 2},
        "optim": {"lr": 1e-2, "schedule": "constant", "ema": 0.5},
    }
    train.run(toy.recipe(**common), toy.TOY, tmp_path / "whole")
    train.run(toy.recipe(**{**common, "steps": 3}), toy.TOY, tmp_path / "run")
    saved = checkpoint.open_weights(tmp_path / "run")
    assert saved.names() and all(lora.is_factor(name) for name in saved.names())
    run_dist(train.run, 2, toy.recipe(**common, parallel=fields), toy.TOY, tmp_path / "run", resume=True)
    for a, b in zip(_losses(tmp_path / "run"), _losses(tmp_path / "whole"), strict=True):
        assert abs(a - b) <= FP64 * abs(b)
    for ema in (False, True):
        ours, want = (checkpoint.open_weights(tmp_path / name, ema=ema) for name in ("run", "whole"))
        for name in want.names():
            assert torch.allclose(ours.read(name), want.read(name), rtol=1e-8, atol=1e-11), name
