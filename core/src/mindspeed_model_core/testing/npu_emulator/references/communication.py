"""Matrix products fused with a collective, over the emulated HCCL group that ``hcom`` names.

A caller gets the name from ``group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators import reference, require, rule

_TYPES = {torch.float16: 3, torch.bfloat16: 11, torch.float32: 4}
_library: dict[str, ctypes.CDLL] = {}


def use(library: ctypes.CDLL) -> None:
    """Take the emulated HCCL that process groups run on."""
    library.emulator_comm.restype = ctypes.c_void_p
    library.emulator_comm.argtypes = [ctypes.c_char_p]
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    _library["hccl"] = library


def buffer_size(name: str) -> int:
    """Return the buffer size in MB that a group's communicator was made with; 0 for the default."""
    return int(_library["hccl"].emulator_comm_buffer(name.encode()))


class _Group:
    def __init__(self, name: str) -> None:
        self.hccl = _library["hccl"]
        self.comm = self.hccl.emulator_comm(name.encode())
        require(bool(self.comm), f"hcom={name!r} names an open HCCL group; get_hccl_comm_name gives its name")
        size = ctypes.c_uint32()
        self.hccl.HcclGetRankSize(ctypes.c_void_p(self.comm), ctypes.byref(size))
        self.size = size.value

    def _do(self, function: Callable[..., int], given: Tensor, out: Tensor, count: int, *how: int) -> Tensor:
        kind = ctypes.c_int(_TYPES[given.dtype])
        pointers = ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr())
        status = function(*pointers, ctypes.c_uint64(count), kind, *how, ctypes.c_void_p(self.comm), None)
        if status:
            raise RuntimeError(self.hccl.aclGetRecentErrMsg().decode())
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._do(self.hccl.HcclAllReduce, x.contiguous(), torch.empty_like(x), x.numel(), 0)

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        return self._do(self.hccl.HcclAllGather, x.contiguous(), out, x.numel())

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        return self._do(self.hccl.HcclReduceScatter, x.contiguous(), out, out.numel(), 0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def _check_operands(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> None:
    halves = a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)
    require(halves, f"both operands are fp16 or both bf16, not {a.dtype} and {b.dtype}")
    require(
        a.dim() in dims and b.dim() == 2, f"{a.dim()} and {b.dim()} dims: the first has one of {dims}, the second 2"
    )
    require(a.shape[-1] == b.shape[0], f"K agrees: {tuple(a.shape)}, {tuple(b.shape)}")
    require(a.is_contiguous(), "the first operand is not a transposed view")


@rule("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base")
def _check_two_dims(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    gather_index: int = 0,
    bias: Tensor | None = None,
    **_: object,
) -> None:
    _check_operands(input, x2, (2,))
    require(256 <= input.shape[-1] < 65535, f"K={input.shape[-1]} is from 256 to 65534")
    require(world_size in (2, 4, 8, 16), f"world_size={world_size} is 2, 4, 8 or (A3) 16")
    require(world_size == _Group(hcom).size, f"world_size={world_size} is the group's, {_Group(hcom).size}")
    require(gather_index == 0 and bias is None, "gather_index is 0 and there is no bias")


@rule("npu_mm_reduce_scatter_base")
def _check_rows(input: Tensor, world_size: int, reduce_op: str = "sum", **_: object) -> None:
    require(len(input) % world_size == 0, f"the {len(input)} rows divide among {world_size} ranks")
    require(reduce_op == "sum", f"reduce_op is sum, not {reduce_op}")


@rule("npu_mm_all_reduce_base")
def _check_all_reduce(x1: Tensor, x2: Tensor, hcom: str, reduce_op: str = "sum", **_: object) -> None:
    _check_operands(x1, x2, (2, 3))
    require(x1.numel() > 0 and x2.numel() > 0, "neither operand is empty")
    require(_Group(hcom).size in (1, 2, 4, 8), "the group has 1, 2, 4 or 8 ranks")
    require(reduce_op == "sum", f"reduce_op is sum, not {reduce_op}")


@reference("npu_mm_all_reduce_base")
def _mm_all_reduce(x1: Tensor, x2: Tensor, hcom: str, reduce_op: str = "sum", bias: Tensor | None = None) -> Tensor:
    """All-reduce of ``x1 @ x2``, to which each rank adds its own bias."""
    product = x1.float() @ x2.float()
    return _Group(hcom).all_reduce((product if bias is None else product + bias.float()).to(x1.dtype))


@reference("npu_all_gather_base_mm")
def _all_gather_mm(
    input: Tensor, x2: Tensor, hcom: str, world_size: int, gather_output: bool = True
) -> tuple[Tensor, Tensor | None]:
    rows = _Group(hcom).all_gather(input)
    return _product(rows, x2), rows if gather_output else None


@reference("npu_mm_reduce_scatter_base")
def _mm_reduce_scatter(input: Tensor, x2: Tensor, hcom: str, world_size: int, reduce_op: str = "sum") -> Tensor:
    return _Group(hcom).reduce_scatter(_product(input, x2))
