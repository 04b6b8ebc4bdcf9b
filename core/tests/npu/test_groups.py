"""Process groups over the emulated HCCL: results, sizes of buffers, and calls that ranks make differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator
from torch import Tensor

pytestmark = [pytest.mark.npu, needs_emulator]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8)


def every_collective(kind: str) -> dict[str, Tensor]:
    """Return the results of all collectives that training uses, on this rank, of more than one of HCCL's slots."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind, rank) if kind == "npu" else torch.device("cpu")
    out: dict[str, Tensor] = {}
    for dtype in DTYPES:
        draw = torch.Generator().manual_seed(rank)
        x = torch.randint(-4, 5, (600_000,), generator=draw).to(dtype).to(device)
        name = str(dtype)
        for how in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            y = x.clone()
            dist.all_reduce(y, op=how)
            out[f"all_reduce {how} {name}"] = y
        y = x.new_empty(world * len(x))
        dist.all_gather_into_tensor(y, x)
        out[f"all_gather {name}"] = y
        y = x.new_empty(len(x) // world)
        dist.reduce_scatter_tensor(y, x)
        out[f"reduce_scatter {name}"] = y
        y = x.clone()
        dist.broadcast(y, 1)
        out[f"broadcast {name}"] = y
        sent = [100, 599_900] if rank == 0 else [200, 599_800]
        got = [100, 200] if rank == 0 else [599_900, 599_800]
        y = x.new_empty(sum(got))
        dist.all_to_all_single(y, x, got, sent)
        out[f"all_to_all {name}"] = y
        y = x.new_empty(len(x))
        pair = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        out[f"exchange {name}"] = y
        y = x.new_empty(len(x))
        if rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(y, 0)
            out[f"send {name}"] = y
    return {name: value.cpu() for name, value in out.items()}


def test_collectives_give_what_gloo_gives() -> None:
    ours, theirs = (run_on(kind, every_collective, 2, kind) for kind in ("npu", "cpu"))
    for got, want in zip(ours, theirs, strict=True):
        assert got.keys() == want.keys() and len(got) >= 8 * len(DTYPES)
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        assert not wrong, wrong


DIFFERENT: dict[str, tuple[Any, str]] = {
    "length": (lambda rank, x: dist.all_reduce(x[: 4 + rank].contiguous()), "all_reduce of 5 elements"),
    "type": (lambda rank, x: dist.all_reduce(x if rank else x.bfloat16()), "type 11"),
    "operation": (lambda rank, x: dist.all_reduce(x) if rank else dist.broadcast(x, 0), "broadcast of"),
    "reduction": (lambda rank, x: dist.all_reduce(x, op=(dist.ReduceOp.SUM, dist.ReduceOp.MAX)[rank]), "reduction 2"),
    "root": (lambda rank, x: dist.broadcast(x, rank), "root 1"),
    "fp64": (lambda rank, x: dist.all_reduce(torch.ones_like(x, dtype=torch.float64)), "Unsupported data type"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_call_differently_are_told(what: str) -> None:
    call, said = DIFFERENT[what]

    def run() -> str:
        rank = dist.get_rank()
        try:
            call(rank, torch.ones(8, device=torch.device("npu", rank)))
        except Exception as error:
            return str(error)
        return "accepted"

    import re

    for text in run_on("npu", run, 2):
        assert re.search(said, text), text


def test_a_rank_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDSPEED_EMULATED_HCCL_TIMEOUT", "2")

    def run() -> str:
        x = torch.ones(8, device=torch.device("npu", dist.get_rank()))
        dist.all_reduce(x)
        if dist.get_rank() == 0:
            try:
                dist.all_reduce(x)
            except Exception as error:
                return str(error)
        return ""

    def both() -> str:
        said = run()
        dist.barrier(group=dist.new_group(backend="gloo"))
        return said

    assert "not every rank came" in run_on("npu", both, 2)[0]


def test_groups_have_the_buffers_that_are_asked_for() -> None:
    sizes = {"tp": 31, "replicas": 57}

    def run() -> dict[str, int]:
        from mindspeed_model_core.testing.npu_emulator.references.communication import buffer_size

        mesh = open_mesh(ParallelConfig(tp=2), buffers=sizes)
        found = {}
        for axis, group in mesh.groups.items():
            backend = group._get_backend(mesh.device)
            found[axis] = buffer_size(backend.get_hccl_comm_name(dist.get_rank()))
            x = torch.ones(2, device=mesh.device)
            dist.all_reduce(x, group=group)
            assert x.tolist() == [group.size()] * 2
        return found

    for found in run_on("npu", run, 2):
        assert found == {"tp": 31, "replicas": 57, "dp": 200, "pp": 200, "cp": 200}
