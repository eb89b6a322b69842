"""Seconds of a step from what it computes: fitted on measurements, or on paper from a model's shape."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.models.config import ModelConfig

Span = tuple[int, int]  # start and length of a chunk


class Work(NamedTuple):
    """What a step computes. decodes: sequences that gain one token; context: tokens in their caches, in all; prompts:
    chunks of more than one token; pairs: how many (token, earlier token) pairs attention in these chunks looks at."""

    decodes: float = 0.0
    context: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    pairs: float = 0.0


def work(spans: Iterable[Span]) -> Work:
    decodes = context = prompts = tokens = pairs = 0
    for start, length in spans:
        if length == 1:
            decodes += 1
            context += start + 1
        elif length:
            prompts += 1
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
    return Work(decodes, context, prompts, tokens, pairs)


def received(spans: Iterable[Span]) -> Work:
    """The same where the keys and values of prompts come from another device: only last tokens are computed."""
    ends = [start + length for start, length in spans]
    return Work(len(ends), sum(ends))


Cost = Callable[[Work], float]
PRICES = ("step", *Work._fields)


@dataclass(frozen=True)
class FittedCost:
    """Seconds for a step as such, and for each unit of `Work`: in the order of `PRICES`."""

    prices: Sequence[float]

    def __call__(self, work: Work) -> float:
        return self.prices[0] + sum(rate * amount for rate, amount in zip(self.prices[1:], work, strict=True))


def fit(works: Sequence[Sequence[float]], seconds: Sequence[float]) -> FittedCost:
    """Least squares of the relative errors, without negative prices. works: (steps, *Work) of each measurement."""
    measured = np.asarray(seconds)
    rows = np.asarray(works, dtype=float) / measured[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    used = [index for index in range(rows.shape[1]) if rows[:, index].any()]
    solution = np.zeros(rows.shape[1])
    while used:  # what would have a negative price has none, and the rest is fitted again
        found = np.linalg.lstsq(rows[:, used] / scale[used], np.ones(len(measured)), rcond=None)[0]
        if (found >= 0).all():
            solution[used] = found / scale[used]
            break
        used.pop(int(np.argmin(found)))
    return FittedCost(tuple(float(price) for price in solution))


@dataclass(frozen=True)
class Device:
    """An accelerator, per second. `layer_seconds`: what each layer takes besides reading and arithmetic. Links: bytes a
    second of one device to the others of its host, and the least that an all-reduce takes."""

    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float = 141e9
    layer_seconds: float = 10e-6
    link_bytes_per_s: float = 360e9
    collective_seconds: float = 10e-6


@dataclass(frozen=True)
class PaperCost:
    """A roofline: linear layers wait for their weights or for arithmetic, attention for the KV cache or for arithmetic;
    with several ranks each layer ends in two all-reduces, in a ring, not overlapped. All numbers have two bytes."""

    shape: ModelConfig
    device: Device
    ranks: int = 1

    @property
    def weight_bytes(self) -> float:
        """What a step reads, on all ranks together: the head, but not the embedding, which is looked up."""
        s = self.shape
        attention = s.hidden_size * s.head_dim * 2 * (s.num_heads + s.num_kv_heads)
        layer = attention + 3 * s.hidden_size * s.intermediate_size
        return 2.0 * (s.num_layers * layer + s.vocab_size * s.hidden_size)

    def collectives(self, tokens: float) -> float:
        """Seconds in the all-reduces of a step."""
        sent = 2 * (self.ranks - 1) / self.ranks * tokens * self.shape.hidden_size * 2
        each = self.device.collective_seconds + sent / self.device.link_bytes_per_s
        return 2 * self.shape.num_layers * each if self.ranks > 1 else 0.0

    def __call__(self, work: Work) -> float:
        s, device = self.shape, self.device
        tokens = work.decodes + work.prompt_tokens
        linear = max(self.weight_bytes / device.bytes_per_s, self.weight_bytes * tokens / device.flop_per_s)
        attention = work.context * 4 * s.num_layers * s.num_kv_heads * s.head_dim / device.bytes_per_s
        attention += work.pairs * 4 * s.num_layers * s.num_heads * s.head_dim / device.flop_per_s
        return (linear + attention) / self.ranks + s.num_layers * device.layer_seconds + self.collectives(tokens)
