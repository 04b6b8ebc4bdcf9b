"""What a device can do at most: known figures by hardware name, or a matrix product or copies timed here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from . import device as devices

WARM = 1.5
"""Seconds of products before those that are timed, on an accelerator."""


@dataclass(frozen=True)
class Peak:
    """The most FLOP/s one device can do in a precision, and where the figure comes from."""

    flops: float
    source: str


# Dense peaks per device; the first key found in the device's name decides, so longer names come first.
# NVIDIA: data sheets, without sparsity. Ascend 910B: no data sheet gives it; it is what the incumbent's published
# Llama-2 throughput and MFU imply together (373 to 378 TFLOP/s), and what makes our MFU comparable to theirs.
_BF16: dict[str, tuple[float, str]] = {
    "H100 PCIe": (756e12, "data sheet"),
    "H200": (989e12, "data sheet"),
    "H100": (989e12, "data sheet"),
    "H800": (989e12, "data sheet"),
    "A100": (312e12, "data sheet"),
    "A800": (312e12, "data sheet"),
    "910B": (376e12, "derived from published figures"),
}
# Without TF32, which PyTorch leaves off.
_FP32: dict[str, tuple[float, str]] = {
    "H100 PCIe": (51e12, "data sheet"),
    "H200": (67e12, "data sheet"),
    "H100": (67e12, "data sheet"),
    "A100": (19.5e12, "data sheet"),
    "A800": (19.5e12, "data sheet"),
}
_TABLES = {"bf16": _BF16, "bf16-pure": _BF16, "fp32": _FP32}
_DTYPES = {"bf16": torch.bfloat16, "bf16-pure": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def known_peak(hardware: str, precision: str) -> Peak | None:
    """Return the peak of the named hardware in a recipe's precision, or None when no table has it."""
    for key, (flops, source) in _TABLES.get(precision, {}).items():
        if key.lower() in hardware.lower():
            return Peak(flops, source)
    return None


def measured_peak(device: torch.device, precision: str, *, repeats: int = 8) -> Peak:
    """Return the FLOP/s of square matrix products in the recipe's compute dtype: the best of ``repeats``.

    An accelerator is kept at it first for ``WARM`` seconds: at its power limit its clock falls, and a rate of the first
    instant is none that training could have (on an H200 778 TFLOP/s in bf16, and 676 a second later).
    """
    size, warm = (1024, 0.0) if device.type == "cpu" else (8192, WARM)
    at_once = 16 if device.type != "cpu" and _DTYPES[precision] == torch.bfloat16 else 1
    left = torch.randn(size, size, device=device).to(_DTYPES[precision])
    begun, times = time.perf_counter(), list[float]()
    while len(times) < repeats + 1:
        devices.synchronize(device)
        start = time.perf_counter()
        for _ in range(at_once):
            torch.mm(left, left)
        devices.synchronize(device)
        if start - begun >= warm:
            times.append((time.perf_counter() - start) / at_once)
    return Peak(2 * size**3 / min(times), "measured matmul")


def copy_rate(device: torch.device, *, repeats: int = 4) -> float:
    """Return the bytes per second, read and written, of the best of ``repeats`` large copies within the device."""
    # Beyond what caches hold; several at a time where one is too short to be timed by the host.
    size, copies = (2**27, 1) if device.type == "cpu" else (2**28, 16)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        devices.synchronize(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        devices.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size * copies / best
