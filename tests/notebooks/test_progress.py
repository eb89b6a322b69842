"""The line under a cell: what it says, when it is updated, and what stays of it."""

from __future__ import annotations

import pytest

from notebooks import progress
from notebooks.progress import CellLine


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a line shows, with a clock that goes on by 0.1 s each time that it is read."""
    texts: list[str] = []
    times = iter(0.1 * step for step in range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(CellLine, "show", lambda line, text: (texts.append(text), setattr(line, "shown", line)))
    return texts


def test_it_shows_first_and_last_and_few_between(shown: list[str]) -> None:
    line = CellLine()
    for done in range(101):
        line("m3: output tokens", done, 100)
    assert shown[0] == "m3: output tokens: 0 of 100, 0 s"
    assert shown[-1] == "m3: output tokens: 100 of 100, 10 s"
    assert 15 < len(shown) < 25


def test_each_cell_has_a_line_of_its_own_of_which_the_time_stays(shown: list[str]) -> None:
    line = CellLine()
    line("quantising, once", 0, 0)
    line("quantising layer 3", 30, 30)
    assert shown == ["quantising, once, 0 s", "quantising layer 3: 30 of 30, 0 s"]
    line.end()
    assert shown[-1] == "0 s"
    line("m1: warming up", 0, 1)
    assert shown[-1] == "m1: warming up, 0 s"


def test_a_cell_without_long_work_has_none(shown: list[str]) -> None:
    CellLine().end()
    assert shown == []
