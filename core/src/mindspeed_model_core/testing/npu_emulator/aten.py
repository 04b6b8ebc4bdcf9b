"""Numerics of PyTorch's own operators on the emulated NPU: those of the CPU, on the same memory.

torch_npu registers some 1500 kernels for aten operators. Those that only need the runtime stay its own (allocation,
copies of memory, strides); every other whose operator has a CPU kernel is replaced by that one. What has none is left
alone and fails when it launches its missing kernel.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OWN = frozenset(
    "empty.memory_format empty_strided empty_like new_empty_strided as_strided as_strided_ view _reshape_alias set_ "
    "set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor resize_ resize_as_ record_stream "
    "is_pinned _pin_memory is_set_to _local_scalar_dense _to_copy contiguous _lazy_clone squeeze squeeze.dim "
    "unsqueeze unfold _copy_from_and_resize _copy_from".split()
)
"""Operators that need memory and copies alone: torch_npu's code runs."""
SINGLE = frozenset("mm bmm addmm baddbmm addbmm addmv mv dot linear matmul convolution convolution_backward".split())
"""Operators of the matrix unit, which takes no fp64 (CANN's aclnnMatmul and aclnnConvolution)."""

FUSED = frozenset({"_fused_adamw_", "_foreach_lerp_"})
"""Operators of PyTorch that stand in the table of ops as torch_npu's own do: their calls are kept too."""


@dataclass(frozen=True)
class Call:
    """A fused operator that was called, and its operands' shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]


CALLS: list[Call] = []
"""Every fused call of this process so far: a test sees by it that the fused path was taken."""

_libraries: list[torch.library.Library] = []


def install() -> int:
    """Register the CPU's kernels for the npu; return how many. Once per process."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    count = 0
    for full in torch._C._dispatch_get_all_op_names():
        name = full.removeprefix("aten::")
        if name == full or name in OWN or not torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
            continue
        function = _kernel(full, name)
        if function is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is replaced is the point
                library.impl(name, function, "PrivateUse1")
            count += 1
    return count


def _kernel(full: str, name: str) -> Callable[..., Any] | None:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    op = getattr(packet, overload or "default", None)
    if op is None or any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
        return None  # a view: strides are the runtime's
    function: Any = op
    if name == "matmul_backward":  # an operator of torch_npu's matmul formula that no CPU build has
        function = _matmul_backward
    elif not torch._C._dispatch_has_computed_kernel_for_dispatch_key(full, "CPU"):
        return None
    seeded = torch.Tag.nondeterministic_seeded in op.tags
    single = base in SINGLE

    def run(*args: Any, **kwargs: Any) -> Any:
        if base in FUSED:
            CALLS.append(Call(base, tuple(tuple(x.shape) for x in args[0])))
        if single and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
            raise RuntimeError(f"aten::{name} takes no float64 on an NPU")
        return on_cpu(function, args, kwargs, seeded=seeded)

    return run


def is_npu(value: Any) -> bool:
    """Whether a value is a tensor on an NPU."""
    return isinstance(value, Tensor) and value.device.type == "npu"


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of an npu tensor; valid as long as that one lives."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(raw, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_npu(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on an NPU, with its strides."""
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"the NPU emulator has no {tensor.layout} tensors")
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_host(out).copy_(tensor)
    return out


def on_cpu(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], *, seeded: bool = False) -> Any:
    """Call ``function`` with npu tensors replaced by CPU tensors over their memory, and return npu tensors.

    What it writes in place is seen, and an operand it returns is returned. With ``seeded`` it draws from a stream that
    follows from the npu generator's seed and offset, which is moved on.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    device: torch.device | None = None
    generator: torch.Generator | None = None

    def down(value: Any) -> Any:
        nonlocal device, generator
        if isinstance(value, Tensor):
            if value.device.type != "npu":
                return value
            device = device or value.device
            for npu, cpu in pairs:
                if npu is value:
                    return cpu
            pairs.append((value, on_host(value)))
            return pairs[-1][1]
        if isinstance(value, (list, tuple)):
            return type(value)(down(item) for item in value)
        if isinstance(value, torch.device) and value.type == "npu":
            device = device or value
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "npu":
            generator = value
            return None
        return value

    positional = [down(value) for value in args]
    named = {key: down(value) for key, value in kwargs.items()}
    if named.get("pin_memory"):
        named["pin_memory"] = False
    sizes = [cpu.size() for _, cpu in pairs]
    if seeded and device is not None:
        with _Drawn(generator or _default_generator(device)):
            out = function(*positional, **named)
    else:
        out = function(*positional, **named)
    for (npu, cpu), size in zip(pairs, sizes, strict=True):
        if cpu.size() != size:  # an out= operand that the operator has resized
            npu.resize_(cpu.size())
            on_host(npu).copy_(cpu)

    def up(value: Any) -> Any:
        if isinstance(value, Tensor):
            for npu, cpu in pairs:
                if cpu is value:
                    return npu
            return on_npu(value, device or _current()) if value.device.type == "cpu" else value
        if isinstance(value, (list, tuple)):
            return type(value)(up(item) for item in value)
        return value

    return up(out)


def _current() -> torch.device:
    return torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]


def _default_generator(device: torch.device) -> torch.Generator:
    index = device.index if device.index is not None else _current().index
    return torch.npu.default_generators[index]  # type: ignore[attr-defined]


class _Drawn:
    """While open, the CPU's default generator is a stream of an npu generator's seed and offset; both move on."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __enter__(self) -> None:
        self.before = torch.default_generator.get_state()
        state = self.generator.get_state()  # seed and offset, 8 bytes each
        seed, offset = (int(v) for v in state.view(torch.int64)[:2])
        torch.default_generator.manual_seed((seed * 6364136223846793005 + offset * 1442695040888963407) % 2**63)
        state.view(torch.int64)[1] = offset + 4  # the Philox offset counts in fours
        self.generator.set_state(state)

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self.before)


def _matmul_backward(grad: Tensor, one: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``one @ other`` that ``mask`` asks for."""
    a = one.unsqueeze(0) if one.dim() == 1 else one
    b = other.unsqueeze(1) if other.dim() == 1 else other
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    if one.dim() == 1:
        grad = grad.unsqueeze(-2)
    first = (grad @ b.mT).sum_to_size(a.shape).reshape(one.shape) if mask[0] else None
    second = (a.mT @ grad).sum_to_size(b.shape).reshape(other.shape) if mask[1] else None
    return first, second
