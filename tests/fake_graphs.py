"""CUDA graphs without a GPU: a recording that calls the function again, over the same tensors that never move. And a
side stream whose copies come as late as its events allow: what is overwritten too early, or read, is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import cuda_graphs, runner
from common.config import EngineConfig


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


class LateStream:
    """A `SideStream` that does nothing until somebody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._put = self._done = 0
        self._copies: list[Callable[[], None]] = []

    def put(self, copy: Callable[[], None], after: object = None) -> None:
        self._copies.append(copy)
        self._put += 1

    def mark(self) -> LateMark:
        return LateMark(self, self._put)

    def join(self) -> None:
        self.run(self._put)

    @torch.inference_mode()
    def run(self, end: int) -> None:
        while self._done < end:
            self._copies.pop(0)()
            self._done += 1


class LateMark:
    def __init__(self, stream: LateStream, end: int) -> None:
        self._stream, self._end = stream, end

    def synchronize(self) -> None:
        self._stream.run(self._end)


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are built from now on copy late."""
    monkeypatch.setattr(runner, "SideStream", LateStream)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch, late_copies: None) -> type[FakeRecorder]:
    """Engines that are built from now on capture their steps, as on a GPU, and copy late."""
    monkeypatch.setattr(EngineConfig, "captures", property(lambda config: config.cuda_graphs))
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", FakeRecorder)
    FakeRecorder.recordings = FakeRecorder.replays = 0
    return FakeRecorder
