import math

import pytest
import torch
from mindspeed_model_core.optim import AdamW, learning_rate
from mindspeed_model_core.parallel import apply, pipeline
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import OptimConfig, ParallelConfig
from mindspeed_model_core.testing import toy


def test_schedule():
    cosine = OptimConfig(lr=1.0, warmup=10, min_lr_ratio=0.1)
    assert learning_rate(cosine, 5, 110) == 0.5
    assert learning_rate(cosine, 10, 110) == 1.0
    assert math.isclose(learning_rate(cosine, 60, 110), 0.55)
    assert math.isclose(learning_rate(cosine, 110, 110), 0.1)
    assert math.isclose(learning_rate(cosine.model_copy(update={"schedule": "linear"}), 35, 110), 0.775)
    assert learning_rate(cosine.model_copy(update={"schedule": "constant"}), 99, 110) == 1.0


@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_torch_adamw_and_clipping(clip):
    """Four steps by the plain recipe: torch's own AdamW, clip_grad_norm_, decay on matrices only."""
    config = OptimConfig(lr=1e-2, weight_decay=0.3, clip=clip)
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    ours = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision="fp64")
    apply.initialise(ours, seed=1)
    plain = toy.Toy(toy.ToyConfig()).double()
    plain.load_state_dict(net.state_dict())
    optimizer = AdamW(ours, config)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=config.betas, eps=config.eps, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(4):
        batches = [toy.batch(3 * step + i) for i in range(3)]
        count = torch.tensor(float(sum((b["labels"] != -100).sum() for b in batches)))
        pipeline.run(ours, batches, lambda out, _: out.sum(), count)
        norm = optimizer.step(1e-2)
        ours.gradients.clear()
        theirs.zero_grad()
        (sum(plain(b).sum() for b in batches) / count).backward()
        want = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        theirs.step()
        assert torch.allclose(norm, want, rtol=1e-12)
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


def test_the_norm_of_half_precision_gradients_is_not_rounded_to_their_type():
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    ours = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision="bf16-pure")
    apply.initialise(ours, seed=1)
    for seed in range(3):
        pipeline.run(ours, [toy.batch(seed)], lambda out, _: out.sum(), torch.tensor(1.0))
        grads = [s.gradient.double() for s in ours.shards.values() if s.gradient is not None]
        want = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        norm = AdamW(ours, OptimConfig()).step(0.0)
        assert abs(norm.double() / want - 1) < 1e-5
        ours.gradients.clear()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_updates_nothing(clip):
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    ours = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision="bf16")
    apply.initialise(ours, seed=1)
    optimizer = AdamW(ours, OptimConfig(lr=1e-2, clip=clip))

    def step(scale):
        pipeline.run(ours, [toy.batch(0)], lambda out, _: out.sum() * scale, torch.tensor(1.0))
        norm = optimizer.step(1e-2)
        ours.gradients.clear()
        return norm

    def state():
        shards = [s for s in ours.shards.values() if s.trainable]
        moments = [m for s in shards for m in optimizer.moments(s).values()]
        return [t.clone() for t in [s.master for s in shards] + [s.local for s in shards] + moments + [optimizer.count]]

    step(1.0)
    before = state()
    assert not step(math.nan).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert step(1.0).isfinite()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


@pytest.mark.parametrize(
    ("precision", "clip", "ema", "each"),
    [
        # The norm reads 1 of a width; the update, clipping too, reads 4 and writes 3; an average is read and written.
        ("fp32", None, None, 4 * (1 + 7)),
        ("fp32", 1.0, None, 4 * (1 + 7)),
        ("bf16", 1.0, None, 4 * (1 + 7) + 4 + 2),
        ("bf16-pure", 1.0, 0.9, 2 * (1 + 7) + 2 * 4),
    ],
)
def test_bytes_that_a_step_moves(precision, clip, ema, each):
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    ours = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig(), precision=precision)
    elements = sum(p.numel() for p in net.parameters())
    assert AdamW(ours, OptimConfig(lr=1e-2, clip=clip, ema=ema)).moved == each * elements
