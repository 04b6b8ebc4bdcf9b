"""The device a process works on."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from mindspeed_model_core import device
from mindspeed_model_core.errors import UserError


@pytest.mark.parametrize(("count", "said"), [(1, "there is 1; start 1 or fewer"), (2, "there are 2; start 2 or fewer")])
def test_more_processes_than_devices_are_refused(monkeypatch, count, said):
    chosen = []
    module = SimpleNamespace(device_count=lambda: count, set_device=chosen.append)
    monkeypatch.setattr(device, "_present", lambda kind: kind in ("cuda", "cpu"))
    monkeypatch.setattr(device, "module", lambda device: module)
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(count - 1))
    assert device.pick() == device.torch.device("cuda", count - 1) and len(chosen) == 1
    monkeypatch.setenv("LOCAL_RANK", str(count))
    with pytest.raises(
        UserError, match=f"--nproc: process {count} of this machine has no cuda device of its own, {said}"
    ):
        device.pick()
    assert len(chosen) == 1
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert device.pick().type == "cpu"
    monkeypatch.setenv(device.VARIABLE, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert device.pick().type == "cuda", "empty is not set"


def test_free_memory_on_a_cpu_is_a_processs_part_of_what_can_be_had(monkeypatch) -> None:
    machine = psutil.virtual_memory()
    free = device.free_memory(torch.device("cpu"))
    assert 0 < free <= machine.total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(device, "_number_in", lambda path: {"memory.max": 8000, "memory.current": 3000}[path.name])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.free_memory(torch.device("cpu")) == 1250
    monkeypatch.setattr(device, "_number_in", lambda path: None)
    assert device.free_memory(torch.device("cpu")) == 10**12 // 4


def test_free_memory_of_an_accelerator_is_what_nobody_uses(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (3, 5))
    assert device.free_memory(torch.device("cuda:0")) == 3
