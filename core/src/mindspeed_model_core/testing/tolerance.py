"""How close is equal."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FP32 = 1e-5
FP64 = 1e-9


def distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference as a share of the largest wanted value; infinite for nan or another shape."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    scale = want.abs().max().item() if want.numel() else 0.0
    return (got.double() - want.double()).abs().max().item() / max(scale, 1e-12) if want.numel() else 0.0


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """Fail, naming the worst tensor, unless both hold the same names and all are within ``tolerance``."""
    assert set(got) == set(want), f"names differ: {sorted(set(got) ^ set(want))[:8]}"
    far = {name: distance(got[name], want[name]) for name in want}
    worst = max(far, key=lambda name: far[name])
    assert far[worst] <= tolerance, f"{worst} differs by {far[worst]:.2e} (allowed {tolerance:.0e})"
