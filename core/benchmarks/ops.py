"""Times every op that has an entry on this accelerator beside its plain reference: forward and backward.

    python core/benchmarks/ops.py [NAME ...]

Prints a table: time of the reference and of what serves the op, their ratio, and how much of what the device can do
that is. A ceiling is measured in the same run: a copy for ops that move memory, a matrix product for those that
compute. Memory counted is what must move at least: operands and gradients, each once.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.peak import measured_peak
from rich.console import Console
from rich.table import Table
from torch import Tensor

WIDTH, TOKENS = 1536, 32760
"""A clip of 81 x 480 x 832 in Wan2.1-1.3B."""
LLAMA = 4096
"""Tokens and width of Llama-2-7B."""


@dataclass(frozen=True)
class Row:
    """An op at a shape; ``flops`` are those of forward and backward, 0 for an op that moves memory."""

    op: str
    shape: str
    make: Callable[[Callable[..., Tensor]], tuple[Any, ...]]
    flops: float = 0.0
    named: dict[str, Any] = field(default_factory=dict)


def rows() -> Iterator[Row]:
    """Return what is timed: the shapes of the two networks that are trained here."""
    wan, llama = (TOKENS, 1, WIDTH), (LLAMA, LLAMA)
    yield Row("rms_norm", "32760x1536", lambda r: (r(*wan), r(WIDTH), 1e-6))
    yield Row("rms_norm", "4096x4096", lambda r: (r(*llama), r(LLAMA), 1e-5))
    yield Row("swiglu", "4096x22016", lambda r: (r(LLAMA, 22016),))


def timed(work: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median milliseconds of one call, by the device's own clock.

    The calls are queued while the device is kept busy, so that what is timed is the device and not Python.
    """
    for _ in range(5):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def both_ways(row: Row, level: int, device: torch.device, dtype: torch.dtype) -> tuple[float, int, Any]:
    """Return the milliseconds of forward and backward, the bytes that must move, and what served the op."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    op = ops.TABLE[row.op]
    args = row.make(draw)
    learn = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    with ops.at_level(level):
        entry = op.serving(device.type, *args, **row.named)
        outs = op(*args, **row.named)
        outs = [outs] if isinstance(outs, Tensor) else [out for out in outs if out.requires_grad]
        grads = [torch.randn_like(out) for out in outs]

        def work() -> None:
            made = op(*args, **row.named)
            made = [made] if isinstance(made, Tensor) else [out for out in made if out.requires_grad]
            if learn:
                torch.autograd.grad(made, learn, grads)

        operands = sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))
        results = sum(x.numel() * x.element_size() for x in outs)
        # Forward reads operands and writes results; backward reads both again and writes the operands' gradients.
        return timed(work), 3 * operands + 2 * results, entry


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    a = torch.empty(2**30, device=device, dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * a.numel() / timed(lambda: b.copy_(a)) * 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="ops to time; all by default")
    wanted = parser.parse_args().names
    device = devices.pick()
    if device.type != "cuda":
        parser.error(f"times by CUDA's clock, and the device here is {device.type}")
    rate, peak = copy_rate(device), measured_peak(device, "bf16").flops
    table = Table("op", "shape", "dtype", "served by", "plain ms", "ms", "plain / ms", "GB/s or TFLOP/s", "of ceiling")
    for row in rows():
        if wanted and row.op not in wanted:
            continue
        plain, _, _ = both_ways(row, 0, device, torch.bfloat16)
        took, moved, entry = both_ways(row, 2, device, torch.bfloat16)
        speed = row.flops / took * 1e3 if row.flops else moved / took * 1e3
        figure = f"{speed / 1e12:.0f} TFLOP/s" if row.flops else f"{speed / 1e9:.0f} GB/s"
        by = "reference" if entry is None else " ".join(entry.calls)
        share = speed / (peak if row.flops else rate)
        table.add_row(
            row.op, row.shape, "bf16", by, f"{plain:.3f}", f"{took:.3f}", f"{plain / took:.2f}", figure, f"{share:.0%}"
        )
    console = Console(width=160)
    console.print(table)
    ceilings = f"copy {rate / 1e9:.0f} GB/s, product {peak / 1e12:.0f} TFLOP/s"
    console.print(f"{devices.name(device)}, torch {torch.__version__}: {ceilings}")


if __name__ == "__main__":
    main()
