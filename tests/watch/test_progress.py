"""Progress bars without a terminal."""

from __future__ import annotations

import sys

import pytest

from common.watch.progress import listening, progress_bar


def test_a_listener_hears_what_a_terminal_would_show(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *what: heard.append(what)):
        with progress_bar("reading", 3) as advance:
            advance(1)
            advance(2, "the last page")
        with progress_bar("unseen", 3, show=False) as advance:
            advance(1)
    assert heard == [("reading", 0, 3), ("reading", 1, 3), ("reading the last page", 3, 3)]
    with progress_bar("afterwards", 1) as advance:
        advance(1)
    assert len(heard) == 3
    assert not sys.stderr.isatty() and capsys.readouterr().err == ""
