"""Tensors on their way to this machine's accelerator."""

import pytest
import torch
from mindspeed_model_core import device as devices


@pytest.mark.parametrize("tensor", [torch.arange(6.0), torch.ones(2, 1).expand(2, 3), torch.zeros(0, 3)], ids=str)
def test_whatever_is_sent_arrives(tensor):
    sent = devices.send(tensor, devices.pick())
    assert sent.device == devices.pick() and torch.equal(sent.cpu(), tensor)
