"""Training steps on an emulated NPU: the fused update runs, and gives the weights, moments and average of the CPU."""

from __future__ import annotations

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.optim import AdamW
from mindspeed_model_core.parallel import apply, pipeline
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import OptimConfig, ParallelConfig
from mindspeed_model_core.testing import npu_emulator, toy
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator
from mindspeed_model_core.testing.tolerance import assert_close
from torch import Tensor

pytestmark = [pytest.mark.npu, needs_emulator]
NPU = torch.device("npu:0" if npu_emulator.installed() else "cpu")  # without torch_npu torch does not know the name
CPU = torch.device("cpu")


def trained(device: torch.device, start: dict[str, Tensor], ema: float | None, level: int) -> dict[str, Tensor]:
    """Return all that three steps leave, the first two of them before a new optimizer goes on from their state."""
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    ours = apply.parallelize(net, Mesh(device), ParallelConfig(), precision="fp32")
    for name, shard in ours.shards.items():
        shard.write(start[name].to(device))
    config = OptimConfig(lr=1e-2, weight_decay=0.3, clip=0.5, ema=ema)
    optimizer = AdamW(ours, config)
    for number in range(3):
        if number == 2:
            before, optimizer = optimizer, AdamW(ours, config)
            optimizer.resume(number)
            optimizer.state, optimizer.average = before.state, before.average
        batch = {key: value.to(device) for key, value in toy.batch(number).items()}
        with ops.at_level(level):
            pipeline.run(ours, [batch], lambda out, _: out.sum(), torch.tensor(3.0, device=device))
            optimizer.step(1e-2 / (number + 1))
        ours.gradients.clear()
    found = {name: s.master for name, s in ours.shards.items()}
    found |= {f"{key} {name}": m for name, s in ours.shards.items() for key, m in optimizer.moments(s).items()}
    if optimizer.average is not None:
        found |= {f"average {name}": value for name, value in optimizer.average.values().items()}
    return {name: value.detach().cpu() for name, value in found.items()}


def emulated(*args: object) -> tuple[dict[str, Tensor], set[str]]:
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    del CALLS[:]
    return trained(NPU, *args), {call.name for call in CALLS}  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("ema", [None, 0.8])
def test_steps_equal_the_cpus(ema: float | None, level: int) -> None:
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in toy.Toy(toy.ToyConfig()).named_parameters()}
    got, calls = run_on("npu", emulated, 1, start, ema, level)[0]
    assert ("_fused_adamw_" in calls) == (level > 0)
    assert_close(got, run_on("cpu", trained, 1, CPU, start, ema, 2)[0], 2e-5)
