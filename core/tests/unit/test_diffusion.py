"""The diffusion time is an island of fp32 in a network of bf16."""

import pytest
import torch
from mindspeed_model_core import lora
from mindspeed_model_core import nn as layers
from mindspeed_model_core.parallel import pipeline
from mindspeed_model_core.recipe import LoraConfig
from mindspeed_model_core.trunk import Noise


@pytest.mark.parametrize("adapted", [False, True])
def test_time_is_computed_in_fp32_whatever_the_weights_are_in(adapted):
    """Values and gradients are those of the same weights held in fp32; those of the weights are rounded once."""
    torch.manual_seed(0)
    narrow, wide = layers.TimeEmbedding(32, 24, 6), layers.TimeEmbedding(32, 24, 6)
    for net in (narrow, wide) if adapted else ():
        net.out.lora = lora.Adapter(net.out, LoraConfig(rank=2), "out", Noise())
        for factor in net.out.lora.parameters():
            torch.nn.init.normal_(factor)
    wide.load_state_dict(narrow.bfloat16().state_dict())
    time = torch.tensor([3.0, 977.3])
    for got, want in zip(narrow(time), wide(time), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    for net in (narrow, wide):
        sum((out**2).sum() for out in net(time)).backward()
    for (name, got), want in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert got.grad.dtype == torch.bfloat16, name
        torch.testing.assert_close(got.grad, want.grad.bfloat16(), rtol=1 / 128, atol=1e-6)
    assert all(out.dtype == torch.float64 for out in wide.double()(time))


def test_no_copy_of_the_weights_is_kept_for_backward():
    linear = layers.Linear(64, 48).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.dtype) or x, lambda x: x):
        linear(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert saved == [torch.float32, torch.bfloat16]


def test_a_state_crosses_stages_in_one_dtype():
    state = {"x": torch.ones(3, 2, dtype=torch.bfloat16), "time": torch.full((1, 2), 1.001)}
    packed = pipeline.pack(state, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    back = pipeline.unpack(packed, {"x": (3, 2), "time": (1, 2)})
    assert torch.equal(back["x"], state["x"]) and torch.equal(back["time"], state["time"].bfloat16())
