"""CUDA graphs without a GPU: a recording that calls the function again, over the same tensors that never move."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.config import EngineConfig
from common.execution import choose_runner


class FakeRecorder:
    """Counts what is recorded and what is repeated."""

    recordings: int = 0
    replays: int = 0

    def __call__(self, function: Callable[[], None]) -> FakeGraph:
        function()
        type(self).recordings += 1
        return FakeGraph(function)


class FakeGraph:
    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def replay(self) -> None:
        FakeRecorder.replays += 1
        self._function()


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecorder]:
    """Engines that are built from now on capture their steps, as on a GPU."""
    monkeypatch.setattr(EngineConfig, "captures", property(lambda config: config.cuda_graphs))
    monkeypatch.setattr(choose_runner, "CudaRecorder", FakeRecorder)
    FakeRecorder.recordings = FakeRecorder.replays = 0
    return FakeRecorder
