"""`--share 2/8`: of the selected tests those of the third of eight processes, for a machine without pytest-xdist."""

from __future__ import annotations

from typing import Any

TOGETHER = 8
"""Neighbours stay in one process: they differ in a length, and share what was compiled for the first."""


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--share", metavar="K/N", help="run share K (from 0) of N equal ones")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    share = config.getoption("--share")
    if share:
        mine, shares = map(int, share.split("/"))
        kept = [item for number, item in enumerate(items) if number // TOGETHER % shares == mine]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
