"""What runs a workload: a stage's engine, or a peer. Both look the same to the worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from benchmarks.measure import AttentionClock
from benchmarks.recipes import BenchRequest
from benchmarks.record import Run
from benchmarks.workloads import Size
from common.config import parse_device, parse_dtype

OnTokens = Callable[[int], None]  # called with the number of tokens that have just come, for the progress bar


@dataclass(frozen=True)
class Setting:
    """What every contestant of a comparison gets. options: the caller's, which override those of the workload
    (`size.options`); one that a stage does not have is an error."""

    model: str
    dtype: torch.dtype
    device: torch.device
    size: Size
    options: dict[str, Any]

    @classmethod
    def of(cls, model: str, dtype: str, device: str, size: Size, options: dict[str, Any]) -> Self:
        return cls(model, parse_dtype(dtype), parse_device(device), size, options)


class Contestant(Protocol):
    """note: what a reader of its row must know; None where there is nothing to say."""

    vocab_size: int
    note: str | None

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        """Run all requests to their ends, each from when it arrives (see `BenchRequest`; peers know the clock alone);
        timelines in the order of the requests."""
        ...

    def attention_clock(self) -> AttentionClock | None:
        """Adds up the time in attention over the next run; None where nothing tells us (peers)."""
        return None

    def close(self) -> None: ...
