"""Gives every test the mark of its tier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

TIERS = ("unit", "dist", "parity", "npu", "device", "docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test by the folder it is in, unless it is marked itself; without either it is a unit test."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker(next((part for part in reversed(item.path.parts) if part in TIERS), "unit"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests on an accelerator found (their property ``found``), and on what: a report to send."""
    rows = list(_found(terminalreporter))
    if not rows:
        return
    from mindspeed_model_core import device as devices
    from mindspeed_model_core.perf import stack

    terminalreporter.section(f"found on {devices.name(devices.pick())}")
    terminalreporter.write_line(stack())
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        terminalreporter.write_line("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)))


def _found(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, ...]]:
    """Yield what was tested, served by what, in how many cases, how many failed, and how far off the worst was."""
    found: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for outcome in ("passed", "failed"):
        for report in reporter.stats.get(outcome, ()):
            for name, value in report.user_properties:
                if name == "found":
                    what, by, far = value
                    found.setdefault((what, by), []).append((outcome == "passed", far))
    for (what, by), cases in found.items():
        failed = sum(not passed for passed, _ in cases)
        result = f"{failed} of {len(cases)} failed" if failed else f"{len(cases)} passed"
        yield what, by, result, f"at most {max(far for _, far in cases):.1e} off"
