"""One more run, after the timed ones: how long it spends in attention, and how much memory comes and goes.

It is a run of its own because watching costs time: a clock at every layer, on a GPU two events.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from benchmarks.contestant import Contestant
from benchmarks.measure import ActivationPeak
from benchmarks.recipes import BenchRequest


def probe(
    contestant: Contestant, requests: Sequence[BenchRequest], device: torch.device
) -> tuple[float | None, int | None]:
    """Seconds in attention and bytes of activations at their peak, over one run; None: not known here."""
    clock = contestant.attention_clock()
    memory = ActivationPeak(device)
    with memory, clock or nullcontext():
        contestant.run(requests, lambda tokens: None)
    return clock.seconds() if clock else None, memory.bytes
