"""Where a step's time goes: phases add up to the step, and overlapping kernels are counted once."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mindspeed_model_core import breakdown, perf
from mindspeed_model_core import device as devices
from mindspeed_model_core.breakdown import PHASES, Activity, Breakdown, Clock, Phase, covered, of_events, of_table
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.peak import Peak
from mindspeed_model_core.testing import toy
from mindspeed_model_core.train import Session
from rich.console import Console
from torch.autograd import DeviceType

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(5, 6), (1, 3)], 3),
        ([(1, 3), (2, 5)], 4),
        ([(1, 9), (2, 3), (4, 5), (8, 10)], 9),
        ([(1, 3), (3, 4)], 3),
        ([(1, 3), (1, 3)], 2),
        ([(4, 2), (5, 6)], 1),
    ],
)
def test_what_is_covered_twice_counts_once(spans, wanted):
    assert covered(spans) == wanted
    assert covered(reversed(spans)) == wanted


def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CUDA, note: bool = False) -> Any:
    """Return what PyTorch's profiler says of something that ran, in microseconds."""
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=note)


ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def test_communication_beside_computing_is_told_apart():
    ran = of_events(
        [
            event("gemm", 100, 110),
            event("gemm", 108, 130),  # on another stream
            event(ALL_REDUCE, 120, 150),  # 10 beside the gemm
            event("norm", 140, 145),
            event("Memcpy PtoP (Device -> Device)", 150, 160),
            event("Memcpy HtoD (Pinned -> Device)", 170, 180),
            event("nccl:all_reduce", 90, 200, note=True),
            event("aten::mm", 50, 300, DeviceType.CPU),
        ],
        CUDA,
    )
    assert ran is not None
    assert [round(1e6 * s, 6) for s in (ran.step_s, ran.communication, ran.exposed, ran.idle)] == [80, 40, 25, 10]


def test_a_profiler_without_kernels_tells_nothing():
    assert of_events([event("aten::mm", 50, 300, DeviceType.CPU), event("step", 0, 9, note=True)], CUDA) is None


def test_on_a_cpu_communication_is_when_a_collective_is_under_way():
    """Only within the step: what ranks say to one another before it is not the step's."""
    ran = of_events(
        [
            event("gloo:all_reduce", 0, 120, DeviceType.CPU, True),
            event(breakdown._WINDOW, 100, 200, DeviceType.CPU, True),
            event("gloo:all_reduce", 130, 150, DeviceType.CPU, True),
            event("gloo:send", 140, 160, DeviceType.CPU, True),
            event("aten::mm", 160, 190, DeviceType.CPU),
            event("gloo:barrier", 210, 220, DeviceType.CPU, True),
        ],
        CPU,
    )
    assert ran == Activity(pytest.approx(1e-4), pytest.approx(5e-5), None, None)


def test_torch_npus_table_is_read(tmp_path):
    folder = tmp_path / "rank0" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    (folder / "step_trace_time.csv").write_text(
        "Device_id,Step,Computing,Communication(Not Overlapped),Overlapped,Communication,Free,Stage,Bubble\n"
        "0,,700000.5,100000,50000,150000,200000,0,0\n"
    )
    ran = of_table(tmp_path)
    assert ran == Activity(pytest.approx(1.0000005), pytest.approx(0.15), pytest.approx(0.1), pytest.approx(0.2))
    assert of_table(folder / "nothing") is None


def test_a_device_is_recorded_alone_and_waited_for(monkeypatch):
    """Without the host's side, which would slow it down; ranks begin together, and the step is over before it ends."""
    said: list[Any] = []

    class Profile:
        def __init__(self, activities: Any, on_trace_ready: Any) -> None:
            said.append((activities, on_trace_ready))

        def __enter__(self) -> Profile:
            said.append("begin")
            return self

        def __exit__(self, *_: object) -> None:
            said.append("end")

        def events(self) -> list[Any]:
            return [event("gemm", 0, 3e6), event(ALL_REDUCE, 2e6, 4e6), event("gemm", 5e6, 6e6)]

    kinds = SimpleNamespace(CPU="host", CUDA="device")
    module = SimpleNamespace(ProfilerActivity=kinds, profile=Profile, supported_activities=lambda: supported)
    supported = {"host", "device"}
    monkeypatch.setattr(devices, "profiler", lambda _: module)
    monkeypatch.setattr(devices, "synchronize", lambda _: said.append("wait"))
    mesh = SimpleNamespace(device=CUDA, barrier=lambda: said.append("meet"))
    session: Any = SimpleNamespace(mesh=mesh, step=lambda: said.append("step"))
    assert breakdown.record(session) == Activity(6.0, 2.0, 1.0, 1.0)
    assert said == [(["device"], None), "begin", "meet", "step", "wait", "end"]
    supported.remove("device")
    assert breakdown.record(session) is None


@pytest.fixture
def session() -> Session:
    """The toy with two micro-batches."""
    made = Session(toy.recipe(global_batch=2), toy.TOY, Mesh(CPU), synthetic=True)
    made.start()
    return made


def test_marks_come_in_the_order_of_the_step(session):
    marks: list[str] = []
    session.step(marks.append)
    drawn = ["data", "data", "encode", "data", "encode"]
    assert marks == [*drawn, "forward", "backward", "forward", "backward", "reduction", "optimizer"]
    assert set(marks) == set(PHASES) - {"pipeline"}


def test_a_marked_step_is_the_same_step(session):
    other = Session(toy.recipe(global_batch=2), toy.TOY, Mesh(CPU), synthetic=True)
    other.start()
    for _ in range(2):
        assert session.step().read() == other.step(Clock(CPU).mark).read()
    for name, shard in session.parallel.shards.items():
        assert torch.equal(shard.local, other.parallel.shards[name].local)


def test_phases_add_up_to_the_step(session, monkeypatch):
    """Each mark takes the next of powers of two: no phase's sum equals that of any others."""
    now = itertools.accumulate(2.0**i for i in itertools.count())
    monkeypatch.setattr(breakdown, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock(CPU)
    session.step(clock.mark)
    session.step(clock.mark)
    clock.mark()
    # From mark to mark 2, 4, 8, ...: 11 marks in each step.
    at = {"data": (0, 1, 3), "encode": (2, 4), "forward": (5, 7), "backward": (6, 8), "reduction": (9,)}
    at["optimizer"] = (10,)
    wanted = {name: sum(2.0 ** (1 + i) + 2.0 ** (12 + i) for i in places) for name, places in at.items()}
    assert clock.phases() == wanted
    found = breakdown.take(session, clock, 2)
    assert {p.name: 2 * p.seconds for p in found.phases if p.name != "pipeline"} == wanted
    assert 2 * found.step_s == sum(clock.seconds()) == 2.0**23 - 2
    assert found.recorded is None and session.number == 2  # one process on a CPU has nothing to record


def test_on_a_device_the_queue_is_marked(monkeypatch):
    """By events that keep time, each of which tells milliseconds to another; nothing is waited for."""
    queue = iter((100.0, 350.0, 400.0, 1400.0))

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(queue)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(devices, "module", lambda device: SimpleNamespace(Event=Event))
    clock = Clock(CUDA)
    for name in ("forward", "backward", "forward", ""):
        clock.mark(name)
    assert clock.phases() == {"forward": 1.25, "backward": 0.05}


def test_an_open_session_is_measured_twice(session):
    recipe = toy.recipe(global_batch=2)
    for _ in range(2):
        m = perf.measure(recipe, toy.TOY, steps=2, warmup=0, session=session)
        assert m.breakdown is not None and m.breakdown.steps == 2
        assert all(m.breakdown.seconds(name) > 0 for name in PHASES if name != "pipeline")
        assert m.breakdown.seconds("pipeline") == 0
        assert m.ceilings is not None and m.ceilings.products == m.peak.flops
    assert session.number == 2 * (2 + 2)


def ranks_of(*times: float, device: str = "cuda") -> Any:
    """Return a session whose mesh has this rank's times and, for others, multiples of them."""
    gather = lambda values: [[v * by for v in values] for by in times]  # noqa: E731
    return SimpleNamespace(mesh=SimpleNamespace(device=torch.device(device), world=len(times), gather=gather))


CLOCK: Any = SimpleNamespace(phases=lambda: {"data": 0.2, "forward": 2.0, "backward": 4.0, "pipeline": 1.0})


def test_phases_are_the_mean_of_ranks_and_the_slowest_is_named(monkeypatch):
    monkeypatch.setattr(breakdown, "record", lambda session: Activity(4.0, 1.0, 0.5, 0.25))
    found = breakdown.take(ranks_of(1.0, 3.0), CLOCK, 2)
    assert found.phases[2] == Phase("forward", 2.0, 3.0) and found.step_s == pytest.approx(7.2)
    assert found.recorded == Activity(8.0, 2.0, 1.0, 0.5)
    said = dict(breakdown.rows(found))
    assert said["marked step"] == "7.2 s, mean of 2 more and 2 ranks"
    assert said["  forward"] == " 27.8%  2 s, slowest rank 3 s"
    assert said["  communication"] == " 25.0%  2 s, 1 s of it beside no computing"
    assert said["  idle"] == "  6.2%  500 ms"
    assert "  encode" not in said and "  optimizer" not in said


def test_what_one_rank_cannot_tell_is_not_told(monkeypatch):
    monkeypatch.setattr(breakdown, "record", lambda session: Activity(4.0, 1.0, 0.5, 0.25))
    found = breakdown.take(ranks_of(1.0, float("nan")), CLOCK, 2)
    assert found.recorded is None
    monkeypatch.setattr(breakdown, "record", lambda session: None)
    for ranks, lacks in (((1.0, 1.0), "communication, idle"), ((1.0,), "idle")):
        said = dict(breakdown.rows(breakdown.take(ranks_of(*ranks), CLOCK, 2)))
        assert said[lacks] == "not told: the profiler saw nothing run on the device"
        assert "  idle" not in said and "  communication" not in said and "recorded step" not in said


def test_a_single_device_has_idle_time_and_no_communication(monkeypatch):
    monkeypatch.setattr(breakdown, "record", lambda session: Activity(4.0, 0.0, 0.0, 0.5))
    said = dict(breakdown.rows(breakdown.take(ranks_of(1.0), CLOCK, 1)))
    assert said["  idle"] == " 12.5%  500 ms" and "  communication" not in said


def test_the_summary_fits_80_columns():
    times = {name: 0.123456 for name in PHASES}
    parts = Breakdown("cuda", 8, 3, tuple(Phase(n, s, 2 * s) for n, s in times.items()), Activity(0.9, 0.2, 0.1, 0.05))
    measured: Any = SimpleNamespace(
        model="llama2", recipe="7b-pretrain", digest="28e3e629fc41", devices=8, hardware="NVIDIA H200",
        stack="torch 2.11.0", commit="be5597832337", quartiles=(0.8, 0.9), step_s=0.86, steps=10, unit="samples/s",
        value=lambda: 1.0, samples_per_s=1.0, flops=4e14, mfu=0.404, peak=Peak(989e12, "data sheet"),
        peak_bytes=2**36, breakdown=parts, ceilings=perf.Ceilings(803e12, 3.21e12, 3e11),
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(perf.summary(measured))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert "of products      49.8% of the 803 TFLOP/s that matrix products reach here" in lines
    # 4e14 * 0.86 FLOP in 0.246912 s
    assert lines[lines.index(next(x for x in lines if x.startswith("of products"))) + 1].split()[0] == "173.5%"
    assert "of copies        75.7% of the 3.21 TB/s that copies reach here, during optimizer" in lines
    folded = [line for line in lines if line.startswith(" " * 17) and "during forward and backward" not in line]
    assert not folded
