"""What runs from recordings is what runs as ever, with a stand-in that does again what a graph would replay."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import replay
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.optim import AdamW
from mindspeed_model_core.parallel import apply, pipeline, shard
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import OptimConfig, ParallelConfig, Recipe
from mindspeed_model_core.testing import toy
from torch import Tensor

CPU = torch.device("cpu")


class Rerun:
    """Records as CUDA does: nothing happens meanwhile, and each replay reads and writes the same places."""

    def __init__(self, parallel: apply.Parallel) -> None:
        self.gradients, self.replays = parallel.gradients, []

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before, flat = self.gradients.held, self.gradients.flat
        values = [None if x is None else x.clone() for x in (*before, *flat.values())]
        loss, places, number = work(), self.gradients.held, len(self.replays)
        anew = all(x is None for x in before) and not flat
        for value, place in zip(values, (*places, *flat.values()), strict=True):
            if place is not None:
                place.fill_(torch.nan) if value is None else place.copy_(value)
        loss.fill_(torch.nan)
        self.replays.append(0)

        def again() -> None:
            self.replays[number] += 1
            left = self.gradients.held
            if anew:
                self.gradients.hold([None] * len(places))
            loss.copy_(work())
            if anew:
                for place, made in zip(places, self.gradients.held, strict=True):
                    assert (place is None) == (made is None)
                    if place is not None:
                        place.copy_(made)
                self.gradients.hold(left)

        return again, loss


def _parallel(precision: str, recompute: int = 0) -> apply.Parallel:
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    parallel = apply.parallelize(net, Mesh(CPU), ParallelConfig(), precision=precision, recompute=recompute)
    apply.initialise(parallel, seed=1)
    return parallel


def _losses(output: Tensor, _: object) -> Tensor:
    return output.sum()


def _trained(parallel: apply.Parallel, rows: list[list[int]], replays: replay.Replays | None) -> list[Tensor]:
    """Return each step's loss and the weights after the last; ``rows`` are those of each step's micro-batches."""
    optimizer, found = AdamW(parallel, OptimConfig(lr=1e-2)), []
    for number, step in enumerate(rows):
        batches = [toy.batch(10 * number + n, rows) for n, rows in enumerate(step)]
        count = torch.tensor(float(3 + number))
        found.append(pipeline.run(parallel, batches, _losses, count, replays=replays))
        found.append(optimizer.step(1e-2))
        parallel.gradients.clear()
    return [*found, *(s.master.clone() for s in parallel.shards.values())]


@pytest.mark.parametrize("sums", [False, True], ids=["autograd", "sums"])
@pytest.mark.parametrize(
    ("rows", "replays"),
    [
        ([[8]] * 4, [3]),
        # The second of a step adds to the first, from the second step on.
        ([[8, 8]] * 4, [3, 3]),
        # Another kind adds to zeros where the first leaves its own.
        ([[8], [5], [8], [5], [5], [8]], [2, 2]),
        # After one that runs as ever, gradients lie elsewhere.
        ([[8, 5], [8, 5], [4, 8], [5, 8], [4, 4]], [1, 2, 1, 2]),
    ],
    ids=["one", "two", "kinds", "mixed"],
)
@pytest.mark.parametrize(("precision", "recompute"), [("fp64", 0), ("fp64", 3), ("bf16-pure", 0)])
def test_a_replayed_run_is_the_run(monkeypatch, precision, recompute, rows, replays, sums):
    if sums:
        monkeypatch.setattr(shard, "SUMMING", ("cpu",))
    want = _trained(_parallel(precision, recompute), rows, None)
    parallel = _parallel(precision, recompute)
    record = Rerun(parallel)
    got = _trained(parallel, rows, replay.Replays(parallel, _losses, record))
    assert record.replays == replays
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_a_wider_type_are_added_where_they_always_are():
    rows = [[8, 8], [5, 8], [8, 5]]
    want = _trained(_parallel("bf16"), rows, None)
    parallel = _parallel("bf16")
    record = Rerun(parallel)
    got = _trained(parallel, rows, replay.Replays(parallel, _losses, record))
    assert record.replays == [3, 1]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("precision", ["fp64", "bf16-pure"])
def test_replicas_add_gradients_where_they_always_are(precision):
    rows, found = [[8, 8], [5, 8], [8, 5]], []
    for replayed in (False, True):
        parallel = _parallel(precision)
        parallel.gradients = shard.Gradients(parallel.shards, SimpleNamespace(replicas=2, device=CPU))
        record = Rerun(parallel)
        found.append(_trained(parallel, rows, replay.Replays(parallel, _losses, record) if replayed else None))
    assert record.replays == [3, 1]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Sending(toy.Toy):
    """Takes something from the host on its way."""

    def finish(self, state, context):
        devices.send(torch.ones(2), CPU)
        return super().finish(state, context)


def test_what_needs_the_host_runs_as_ever(monkeypatch):
    rows = [[8, 8]] * 3
    want = _trained(_parallel("fp64"), rows, None)
    monkeypatch.setattr(toy, "Toy", Sending)
    parallel = _parallel("fp64")
    record = Rerun(parallel)
    got = _trained(parallel, rows, replay.Replays(parallel, _losses, record))
    assert not record.replays
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Partly(toy.Toy):
    """Leaves its last block out where a batch has few rows, or in place of that takes something from the host."""

    host = False

    def step(self, index, block, state, context):
        if index < len(self.blocks) - 1 or len(state["x"]) > 5:
            return super().step(index, block, state, context)
        return {"x": state["x"] + devices.send(torch.zeros(()), CPU)} if self.host else state


@pytest.mark.parametrize(
    ("host", "rows", "attempts"),
    [
        # Gradients of the last block would be written over by each replay, not added up.
        (False, [[5], [8], [5], [8], [8], [8, 5], [5, 8]], 2),
        # They lie where they do for one step.
        (False, [[5, 7], [5, 8, 7]], 1),
        (True, [[8], [5], [8], [5], [5], [5, 8], [8, 5]], 2),
    ],
    ids=["made later", "elsewhere", "host"],
)
def test_what_cannot_add_to_the_first_recording_is_tried_once(monkeypatch, host, rows, attempts):
    monkeypatch.setattr(toy, "Toy", Partly)
    monkeypatch.setattr(Partly, "host", host)
    want = _trained(_parallel("fp64"), rows, None)
    parallel = _parallel("fp64")
    record, tried = Rerun(parallel), []
    got = _trained(parallel, rows, replay.Replays(parallel, _losses, lambda work: tried.append(1) or record(work)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(tried) == attempts and any(record.replays)


def test_there_are_so_many_recordings(monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 2)
    rows = [[3], [4], [5]] * 3
    want = _trained(_parallel("fp64"), rows, None)
    parallel = _parallel("fp64")
    record = Rerun(parallel)
    got = _trained(parallel, rows, replay.Replays(parallel, _losses, record))
    assert record.replays == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_batches_of_a_kind_are_alike_in_all_but_their_numbers():
    def kind(batch):
        return replay._kind(*replay.tree_flatten(batch), CPU)

    x = torch.zeros(2, 3)
    assert kind({"x": x, "lengths": (1, 1)}) == kind({"x": x + 1, "lengths": (1, 1)})
    others = ({"x": x.T}, {"x": x.double()}, {"x": x, "y": x}, {"x": (x,)}, {"y": x})
    assert len({kind(each) for each in ({"x": x}, *others)}) == 6
    assert kind({"x": x, "lengths": (1, 1)}) != kind({"x": x, "lengths": (2,)})
    # What an object holds may change.
    assert not any(kind({"x": each}) for each in (x.to("meta"), {1, 2}, object()))


class Graph:
    """Stands in for CUDA's, and for the context that records."""

    def __init__(self, *_, **options):
        self.options = options

    def __enter__(self):
        Graph.pools.append(self.options["pool"])

    def __exit__(self, *_):
        pass

    def replay(self):
        pass


def test_memory_of_what_could_not_be_recorded_is_not_that_of_recordings(monkeypatch):
    parallel, Graph.pools = _parallel("fp64"), []
    monkeypatch.setattr(parallel, "mesh", Mesh(torch.device("cuda")))
    for name in ("CUDAGraph", "Stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(devices, "set_aside", lambda *_: None)
    record = replay.graphs(parallel)

    def failing():
        raise devices.NeedsHost

    for work in (failing, failing, lambda: torch.ones(()), failing, lambda: torch.ones(())):
        with contextlib.suppress(devices.NeedsHost):
            record(work)
    first, second, *later = Graph.pools
    # A tensor that may be left in the pool is cuBLAS' workspace.
    assert first is not second and len({first, second, *later}) == 3 and len(set(later)) == 1


def test_a_device_that_records_no_graphs_is_named():
    with pytest.raises(UserError, match="cuda_graph=true: CUDA records graphs, and the device is cpu"):
        replay.graphs(_parallel("fp64"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"tp": 2}}, "parallel.tp=2: what ranks exchange"),
        ({"parallel": {"pp": 2}}, "parallel.pp=2: what ranks exchange"),
        ({"parallel": {"cp": 2}}, "parallel.cp=2: what ranks exchange"),
        ({"parallel": {"shard": "zero1"}}, "parallel.shard=zero1: what ranks exchange.*set parallel.shard=none"),
        ({"lora": {"rank": 2, "dropout": 0.5}, "init_from": "x"}, "lora.dropout=0.5: what is drawn"),
    ],
)
def test_recipes_that_cannot_be_recorded_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Recipe(preset="tiny", cuda_graph=True, **changes)
