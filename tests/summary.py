"""The last lines of a run: why tests failed, the ten slowest, and the time of all."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from tests import coverage

SLOWEST = 10
MOST_FAILURES = 8
LINES_EACH = 2
"""Of a failure's reason: with the ten slowest, all of it is within the last 30 lines."""

_began = time.perf_counter()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None]:
    yield
    measured = coverage.lines()
    if measured:
        terminalreporter.section("coverage")
    for line in measured:
        terminalreporter.write_line(line)
    terminalreporter.section("slowest")
    for line in slowest(terminalreporter.stats):
        terminalreporter.write_line(line)
    failed = [*terminalreporter.stats.get("failed", ()), *terminalreporter.stats.get("error", ())]
    if failed:
        terminalreporter.section("why")
    for line in reasons(failed):
        terminalreporter.write_line(line, red=True)
    terminalreporter.write_line(f"all of it took {time.perf_counter() - _began:.0f} s")


def slowest(stats: dict[str, list[Any]]) -> list[str]:
    """Set-up and tear-down counted in: a fixture's time is that of the first test that asks for it."""
    times: dict[str, float] = {}
    for reports in stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                times[report.nodeid] = times.get(report.nodeid, 0.0) + report.duration
    top = sorted(times, key=lambda test: -times[test])[:SLOWEST]
    return [f"{times[test]:6.1f} s  {test}" for test in top]


def reasons(failed: list[Any]) -> list[str]:
    lines: list[str] = []
    for report in failed[:MOST_FAILURES]:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
        lines += [report.nodeid, *(f"    {line}" for line in reason.strip().splitlines()[:LINES_EACH])]
    if len(failed) > MOST_FAILURES:
        lines.append(f"... and {len(failed) - MOST_FAILURES} more")
    return lines
