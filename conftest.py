"""Gives every test the mark of its tier."""

from __future__ import annotations

import pytest

TIERS = ("unit", "dist", "parity", "npu", "device", "docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test by the folder it is in, unless it is marked itself; without either it is a unit test."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker(next((part for part in reversed(item.path.parts) if part in TIERS), "unit"))
