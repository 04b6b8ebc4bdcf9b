"""The device a process works on."""

from types import SimpleNamespace

import pytest
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
