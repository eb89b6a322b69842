"""The last lines of a run: why tests failed, the ten slowest, and the time of all."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from tests import coverage

SLOWEST = 10
ROOM = 15
"""Lines for reasons. With the ten slowest, two titles, the time, pytest's last line and one of make's these are 30."""
MOST_REASONS = 25
"""More than `ROOM` push the slowest out of the last 30 lines."""

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
    """Three lines for each failure, or two, or one: as many as there is room for. Of still more, those with the same
    reason share a line."""
    whys = [(report.nodeid, reason(report)) for report in failed]
    if 3 * len(whys) <= ROOM:
        return [line for test, why in whys for line in (test, *(f"    {part}" for part in why))]
    if 2 * len(whys) <= ROOM:
        return [line for test, why in whys for line in (test, f"    {'; '.join(why)}")]
    if len(whys) <= ROOM:
        return [f"{test}: {'; '.join(why)}" for test, why in whys]
    alike: dict[str, list[str]] = {}
    for test, why in whys:
        alike.setdefault("; ".join(why), []).append(test)
    lines = [
        f"{tests[0]}{f' and {len(tests) - 1} more' if len(tests) > 1 else ''}: {why}" for why, tests in alike.items()
    ]
    if len(lines) > MOST_REASONS:
        lines[MOST_REASONS - 1 :] = [f"... and {len(lines) - MOST_REASONS + 1} more reasons"]
    return lines


def reason(report: Any) -> list[str]:
    """One or two lines without blank ones: the first, and how far two tensors are apart or else the second."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    if not crash:
        return lines[-1:]
    apart = [line for line in lines[1:] if "absolute difference" in line.lower()]
    return [lines[0], *(apart or lines[1:])[:1]]
