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
from dataclasses import dataclass
from typing import Any

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.peak import copy_rate, measured_peak
from rich.console import Console
from rich.table import Table
from torch import Tensor

WIDTH, TOKENS = 1536, 32760
"""A clip of 81 x 480 x 832 in Wan2.1-1.3B."""
LLAMA = 4096
"""Tokens and width of Llama-2-7B."""


@dataclass(frozen=True)
class Row:
    """An op at a shape.

    ``flops`` are those of forward and backward, 0 for an op that moves memory; ``moved`` are its bytes where they do
    not follow from operands, results and gradients.
    """

    op: str
    shape: str
    make: Callable[[Callable[..., Tensor]], tuple[Any, ...]]
    flops: float = 0.0
    moved: float = 0.0


def rows() -> Iterator[Row]:
    """Return what is timed: shapes of networks that are trained here."""
    wan, llama = (TOKENS, 1, WIDTH), (LLAMA, LLAMA)
    yield Row("rms_norm", "32760x1536", lambda r: (r(*wan), r(WIDTH), 1e-6))
    yield Row("rms_norm", "4096x4096", lambda r: (r(*llama), r(LLAMA), 1e-5))
    yield Row("layer_norm", "32760x1536", lambda r: (r(*wan), r(WIDTH), r(WIDTH), 1e-6))
    yield Row("layer_norm", "24000x1280", lambda r: (r(24000, 1280), r(1280), r(1280), 1e-5))
    yield Row("add_rms_norm", "4096x4096", lambda r: (r(*llama), r(*llama), r(LLAMA), 1e-5))
    yield Row("add_layer_norm", "32760x1536", lambda r: (r(*wan), r(*wan), r(WIDTH), r(WIDTH), 1e-6))
    yield Row("add_layer_norm", "24000x1280", lambda r: (r(24000, 1280), r(24000, 1280), r(1280), r(1280), 1e-5))
    yield Row("sum_of_squares", "32760x1536", lambda r: (r(*wan),))
    yield Row("rms_norm_given", "32760x1536", lambda r: (r(*wan), wide(r(TOKENS, 1, 1)) ** 2, r(WIDTH), 1e-6))
    yield Row("swiglu", "4096x22016", lambda r: (r(LLAMA, 22016),))
    yield Row("rope", "4096x64x128", lambda r: (r(LLAMA, 64, 128), *tables(r, LLAMA)))
    yield Row(
        "rope_projected_",
        "4096x96x128, 32 for k and v",
        lambda r: (r(LLAMA, 96, 128), *tables(r, LLAMA), 32),
        moved=LLAMA * 128 * 2 * 2 * (64 + 96),  # v is copied backward alone
    )
    yield Row("rope_interleaved", "32760x12x128", lambda r: (r(TOKENS, 1, 12, 128), *tables(r, TOKENS)))
    yield Row("adaln", "32760x1536", lambda r: (r(*wan), learnt(r(1, WIDTH)), learnt(r(1, WIDTH)), 1e-6))
    yield Row("adaln", "768x16x3072", lambda r: (r(768, 16, 3072), r(16, 3072), r(16, 3072), 1e-6))
    yield Row("gated_add", "32760x1536", lambda r: (r(*wan), r(*wan), learnt(r(1, WIDTH))))
    yield Row(
        "cross_entropy",
        "4096x32000",
        lambda r: (r(LLAMA, 32000), torch.randint(32000, (LLAMA,), device=devices.pick())),
    )
    yield Row(
        "linear_cross_entropy",
        "16384x4096, 32000",
        lambda r: (r(4 * LLAMA, LLAMA), r(32000, LLAMA), torch.randint(32000, (4 * LLAMA,), device=devices.pick())),
        3 * 2 * 4 * LLAMA * LLAMA * 32000,
    )
    yield Row(
        "linear_cross_entropy",
        "7168x1280, 51866",
        lambda r: (r(7168, 1280), r(51866, 1280), torch.randint(51866, (7168,), device=devices.pick())),
        3 * 2 * 7168 * 1280 * 51866,
    )
    heads = (32, 32, 32)
    ones = (LLAMA,)
    yield Row(
        "attention",
        "4096x32x128 causal",
        lambda r: (*(r(LLAMA, h, 128) for h in heads), ones),
        attention_flops(ones, 32, 128) / 2,
    )
    grouped, packed = (32, 8, 8), (1000, 37, 2059, 1, 999)
    yield Row(
        "attention",
        "5 documents in 4096x32x128, 8 for k and v, causal",
        lambda r: (*(r(LLAMA, h, 128) for h in grouped), packed),
        attention_flops(packed, 32, 128) / 2,
    )
    yield Row(
        "full_attention",
        "8192x12x128",
        lambda r: tuple(r(8192, 1, 12, 128) for _ in range(3)),
        attention_flops((8192,), 12, 128),
    )
    yield Row(
        "grouped_matmul",
        "16384x2048, 64 experts of 1408",
        lambda r: (r(16384, 2048), r(64, 2048, 1408), torch.full((64,), 256, device=devices.pick())),
        3 * 2 * 16384 * 2048 * 1408,
    )
    yield Row(
        "accumulate_product_",
        "4096 rows, 11008x4096",
        lambda r: (wide(r(11008, LLAMA)), r(LLAMA, 11008).detach(), r(LLAMA, LLAMA).detach()),
        2 * LLAMA * 11008 * LLAMA,
    )
    yield Row("sum_rows", "24000x5120", lambda r: (r(24000, 5120).detach(),), moved=24000 * 5120 * 2)
    million = 2**20
    update = ops.Update(torch.ones((), device=devices.pick()), 1e-4, (0.9, 0.95), 1e-8, 0.1)
    yield Row(
        "adamw_",
        "64 of 1024x1024, fp32",
        lambda r: (*([wide(r(1024, 1024)).abs() for _ in range(64)] for _ in range(4)), update),
        moved=64 * million * 4 * 7,
    )
    yield Row(
        "adamw_",
        "8 of 4096x11008, bf16",
        lambda r: (*([r(LLAMA, 11008).detach().abs() for _ in range(8)] for _ in range(4)), update),
        moved=8 * LLAMA * 11008 * 2 * 7,
    )
    yield Row(
        "ema_adamw_",
        "64 of 1024x1024, fp32",
        lambda r: (*([wide(r(1024, 1024)).abs() for _ in range(64)] for _ in range(5)), update, 0.999),
        moved=64 * million * 4 * 9,
    )


def wide(x: Tensor) -> Tensor:
    """Return a constant in fp32."""
    return x.detach().float()


def learnt(x: Tensor) -> Tensor:
    """Return what is learnt in fp32."""
    return wide(x).requires_grad_()


def tables(draw: Callable[..., Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Return tables of a rotary embedding."""
    return wide(draw(tokens, 128)), wide(draw(tokens, 128))


def attention_flops(lengths: tuple[int, ...], heads: int, width: int) -> float:
    """Return the FLOPs of attention of whole documents: two products forward, five backward."""
    return sum(2 * 7 * length**2 for length in lengths) * heads * width


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


def both_ways(row: Row, level: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float, Any]:
    """Return the milliseconds of forward and backward, the bytes that must move, and what served the op."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    op = ops.TABLE[row.op]
    args = row.make(draw)
    operands = [x for x in args if isinstance(x, Tensor)]
    learn = [x for x in operands if x.requires_grad]
    with ops.at_level(level):
        entry = op.serving(device.type, *args)

        def forward() -> list[Tensor]:
            made = op(*args)
            return [made] if isinstance(made, Tensor) else [x for x in made or () if x.requires_grad]

        outs = forward()
        grads = [torch.randn_like(out) for out in outs]

        def work() -> None:
            made = forward()
            if learn:
                torch.autograd.grad(made, learn, grads)

        # Forward reads operands and writes results; backward reads both again and writes the operands' gradients.
        moved = row.moved or (2 * size(operands) + size(learn) + 2 * size(outs))
        return timed(work), moved, entry


def size(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


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
        by = "reference" if entry is None else entry.by
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
