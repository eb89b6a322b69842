"""Seconds of a step from what it computes: fitted on measurements, or on paper from a model's shape."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from common.models.config import ModelConfig


class Work(NamedTuple):
    """What a step computes. decodes: sequences that gain one token; context: tokens in their caches, in all; prompts:
    chunks of more than one token; pairs: how many (token, earlier token) pairs attention in these chunks looks at."""

    decodes: float = 0.0
    context: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    pairs: float = 0.0


class Span(Protocol):
    """A `Chunk`, or what a trace has of one."""

    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int: ...


def work(chunks: Iterable[Span]) -> Work:
    decodes = context = prompts = tokens = pairs = 0
    for chunk in chunks:
        start, length = chunk.start, chunk.length
        if length == 1:
            decodes += 1
            context += start + 1
        elif length:
            prompts += 1
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
    return Work(decodes, context, prompts, tokens, pairs)


def received(chunks: Iterable[Span]) -> Work:
    """The same where prompts come with their keys and values, from another device: only their last token is computed."""
    spans = list(chunks)
    return Work(len(spans), sum(chunk.start + chunk.length for chunk in spans))


Cost = Callable[[Work], float]
WEIGHTS_OF = ("step", *Work._fields)


@dataclass(frozen=True)
class FittedCost:
    """Seconds for a step as such, and for each unit of `Work`."""

    coefficients: Sequence[float]

    def __call__(self, work: Work) -> float:
        fixed, *rates = self.coefficients
        return fixed + sum(rate * amount for rate, amount in zip(rates, work, strict=True))


def fit(works: Sequence[Sequence[float]], seconds: Sequence[float]) -> FittedCost:
    """Least squares of the relative errors without negative prices. works: of each measurement, (steps, *Work)."""
    measured = np.asarray(seconds)
    rows = np.asarray(works, dtype=float) / measured[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    used = [index for index in range(rows.shape[1]) if rows[:, index].any()]
    solution = np.zeros(rows.shape[1])
    while used:  # whatever would have a negative price has none, and the rest is fitted again
        found = np.linalg.lstsq(rows[:, used] / scale[used], np.ones(len(measured)), rcond=None)[0] / scale[used]
        if (found >= 0).all():
            solution[used] = found
            break
        used.pop(int(np.argmin(found * scale[used])))
    return FittedCost(tuple(float(x) for x in solution))


@dataclass(frozen=True)
class Device:
    """What an accelerator does, per second, and the links between those of one host. layer_seconds: of each layer,
    whatever else takes time in a step. collective_seconds: the least that an all-reduce takes."""

    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float = 141e9
    layer_seconds: float = 10e-6
    link_bytes_per_s: float = 360e9
    collective_seconds: float = 10e-6


@dataclass(frozen=True)
class PaperCost:
    """A roofline: the linear layers wait for their weights or for arithmetic, attention for the KV cache or for
    arithmetic, and with several ranks each layer ends in two all-reduces. All in two-byte numbers."""

    shape: ModelConfig
    device: Device
    ranks: int = 1

    @property
    def weight_bytes(self) -> float:
        """Of all ranks, what a step reads: the embedding is looked up, the head is read."""
        s = self.shape
        attention = s.hidden_size * s.head_dim * (2 * s.num_heads + 2 * s.num_kv_heads)
        layer = attention + 3 * s.hidden_size * s.intermediate_size
        return 2.0 * (s.num_layers * layer + s.vocab_size * s.hidden_size)

    @property
    def kv_bytes_per_token(self) -> float:
        return 4.0 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim

    def collective(self, tokens: float) -> float:
        """Seconds in the all-reduces of a step, in a ring."""
        if self.ranks == 1:
            return 0.0
        sent = 2 * (self.ranks - 1) / self.ranks * tokens * self.shape.hidden_size * 2
        return 2 * self.shape.num_layers * (self.device.collective_seconds + sent / self.device.link_bytes_per_s)

    def __call__(self, work: Work) -> float:
        s, device = self.shape, self.device
        tokens = work.decodes + work.prompt_tokens
        linear = max(self.weight_bytes / device.bytes_per_s, self.weight_bytes * tokens / device.flop_per_s)
        attention = work.context * self.kv_bytes_per_token / device.bytes_per_s
        attention += work.pairs * 4 * s.num_layers * s.num_heads * s.head_dim / device.flop_per_s
        return (linear + attention) / self.ranks + s.num_layers * device.layer_seconds + self.collective(tokens)
