"""What core asks of an NPU through ``device`` and ``profile``, on the emulator."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.profile import Profiler
from mindspeed_model_core.recipe import ProfileConfig
from mindspeed_model_core.testing import npu_emulator
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = [pytest.mark.npu, needs_emulator]
NPU = torch.device("npu:0" if npu_emulator.installed() else "cpu")  # without torch_npu torch does not know the name


def alone(function: Any, *args: Any) -> Any:
    return run_on("npu", function, 1, *args)[0]


def test_an_npu_is_picked_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Any, ...]:
        import os

        del os.environ["MINDSPEED_MODEL_DEVICE"]
        here = devices.pick()
        return here, devices.name(here), devices.backend(here), devices.module(here) is torch.npu  # type: ignore[attr-defined]

    assert alone(run) == (NPU, "Ascend910B1", "cpu:gloo,npu:hccl", True)


def test_peak_memory_is_the_allocators() -> None:
    def run() -> tuple[int, int]:
        x = torch.empty(2**20, device=NPU)
        devices.reset_peak_memory(NPU)
        y = torch.empty(2**20, device=NPU)
        del y
        most = devices.peak_memory(NPU)
        del x
        devices.reset_peak_memory(NPU)
        return most, devices.peak_memory(NPU)

    most, least = alone(run)
    assert 2 * 2**22 <= most <= 2 * 2**22 + 2**20 and least < 2**20


def test_what_nobody_wrote_is_not_a_number() -> None:
    """Fresh memory is poisoned, so that an output that a kernel leaves out shows."""

    def run() -> bool:
        return bool(torch.empty(1000, device=NPU).isnan().all())

    assert alone(run)


def test_random_numbers_follow_the_npus_seed() -> None:
    def run() -> list[list[float]]:
        npu = devices.module(NPU)
        torch.manual_seed(3)
        first = torch.rand(4, device=NPU)
        state = npu.get_rng_state()
        second = torch.rand(4, device=NPU)
        npu.set_rng_state(state)
        again = torch.nn.functional.dropout(torch.ones(64, device=NPU), 0.5)
        torch.manual_seed(3)
        host = torch.rand(4)
        third = torch.rand(4, device=NPU)
        npu.set_rng_state(state)
        assert torch.equal(again, torch.nn.functional.dropout(torch.ones(64, device=NPU), 0.5))
        assert 0 < int((again == 0).sum()) < 64
        return [x.tolist() for x in (first, second, third, host)]

    first, second, third, host = alone(run)
    assert first == third and first != second and first != host


def test_recomputation_draws_the_same_dropout() -> None:
    def run() -> Tensor:
        x = torch.ones(256, device=NPU, requires_grad=True)
        out = checkpoint(lambda y: torch.nn.functional.dropout(y, 0.5) * y, x, use_reentrant=False)
        out.sum().backward()
        assert x.grad is not None
        return torch.stack((out.detach(), x.grad)).cpu()

    out, grad = alone(run)
    assert set(out.tolist()) == {0.0, 2.0} and torch.equal(grad, 2 * out)


def test_streams_events_and_copies_from_pinned_memory() -> None:
    def run() -> list[float]:
        npu = devices.module(NPU)
        side, start, end = npu.Stream(), npu.Event(enable_timing=True), npu.Event(enable_timing=True)
        host = torch.arange(4.0).pin_memory()
        assert host.is_pinned()
        start.record()
        with npu.stream(side):
            x = host.to(NPU, non_blocking=True) * 2
            end.record(side)
        npu.current_stream().wait_stream(side)
        x.record_stream(npu.current_stream())
        devices.synchronize(NPU)
        assert start.elapsed_time(end) >= 0 and end.query()
        out = torch.empty(4, pin_memory=True)
        out.copy_(x, non_blocking=True)
        return out.tolist()

    assert alone(run) == [0.0, 2.0, 4.0, 6.0]


def test_autocast_takes_products_to_bf16() -> None:
    def run() -> tuple[torch.dtype, torch.dtype]:
        x = torch.ones(4, 4, device=NPU)
        with torch.autocast("npu", dtype=torch.bfloat16):
            product = x @ x
            return product.dtype, product.softmax(-1).dtype

    assert alone(run) == (torch.bfloat16, torch.float32)


def test_deterministic_mode_is_on_for_kernels_and_collectives() -> None:
    def run() -> tuple[bool, str, Tensor]:
        import os

        devices.be_deterministic()
        weight = torch.zeros(3, 2, device=NPU, requires_grad=True)
        torch.nn.functional.embedding(torch.tensor([0, 2, 2], device=NPU), weight).sum().backward()
        assert weight.grad is not None
        return torch.are_deterministic_algorithms_enabled(), os.environ["HCCL_DETERMINISTIC"], weight.grad.cpu()

    on, collectives, grad = alone(run)
    assert on and collectives == "true" and grad[:, 0].tolist() == [1.0, 0.0, 2.0]


def test_a_memory_snapshot_holds_allocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is all that is written: torch_npu's own way leaves more in the working folder."""
    monkeypatch.chdir(tmp_path)

    def run(file: Path) -> None:
        assert devices.record_memory(NPU)
        x = torch.ones(12345, device=NPU)
        assert devices.memory_snapshot(NPU, file)
        del x

    alone(run, tmp_path / "snapshot.pickle")
    snapshot = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot.pickle"]
    sizes = [event["size"] for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"]
    assert any(4 * 12345 <= size < 4 * 12345 + 1024 for size in sizes), sizes


def test_a_window_of_steps_is_recorded_with_torch_npus_profiler(tmp_path: Path) -> None:
    """torch_npu writes the host's side of its trace; there is nothing on the emulated device to record."""

    def run(folder: Path) -> None:
        profiler = Profiler(ProfileConfig(start=2, stop=3, memory=True), folder, 0, NPU)
        for number in range(1, 5):
            with profiler.step(number):
                torch.ones(8, 8, device=NPU) @ torch.ones(8, 8, device=NPU)

    alone(run, tmp_path)
    written = sorted(p.relative_to(tmp_path / "profile") for p in (tmp_path / "profile").rglob("*") if p.is_file())
    (trace,) = (p for p in written if p.name == "trace_view.json")
    assert trace.parts[0].startswith("rank0_")
    names = {str(e.get("name")) for e in json.loads((tmp_path / "profile" / trace).read_text())}
    assert {n for n in names if n.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}, names
    assert "aten::matmul" in names or "aten::mm" in names, names
    assert any(p.name.endswith(".memory.pickle") for p in written), written
