"""Logits to tokens, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from common.execution.upload import upload
from common.models.ops import Ops
from common.request import Request, SampledToken
from common.sampling.adjust import adjusted, filter_logits
from common.sampling_params import SamplingParams

_MASK = 2**64 - 1
PLAIN = Ops()


def mix(seed: int, position: int) -> int:
    """A 64-bit hash of two integers (SplitMix64's finaliser; Steele, Lea & Flood, OOPSLA '14)."""
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """The noise of one token, in [0, 1): a function of (seed, position) alone, so that what a request gets does not
    depend on who shares its batch, or on how often it was preempted."""
    return (mix(seed, position) >> 11) * 2.0**-53


@dataclass(slots=True)
class SamplerOutput:
    """Tensors of a sampled step, still on the device: token_ids [S]; where any row asked for log-probabilities,
    those of the k likeliest tokens (ids and values [S, k]) and of the sampled ones [S]."""

    token_ids: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    sampled_logprobs: torch.Tensor | None = None

    def start_copy(self) -> SamplerOutput:
        """The same on the host, in pinned memory; on a GPU to be read only after an event recorded behind this call."""
        if self.sampled_logprobs is None:
            return SamplerOutput(_on_host(self.token_ids))
        return SamplerOutput(*(_on_host(getattr(self, field.name)) for field in fields(self)))

    def to_host(self, requests: Sequence[Request], places: Sequence[int]) -> list[SampledToken]:
        """places: where each request's token is."""
        token_ids: list[int] = self.token_ids.tolist()
        if self.sampled_logprobs is None:
            return [SampledToken(token_ids[place]) for place in places]
        counts = [request.params.logprobs for request in requests]
        logprobs = self.logprobs(places, counts)
        return [SampledToken(token_ids[place], values) for place, values in zip(places, logprobs, strict=True)]

    def logprobs(self, places: Sequence[int], counts: Sequence[int | None]) -> list[dict[int, float] | None]:
        """Of the token at each place, and of as many of the likeliest ones there; None where the count is None."""
        if self.sampled_logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return [None] * len(places)
        token_ids, sampled = self.token_ids.tolist(), self.sampled_logprobs.tolist()
        top_ids, top_values = self.top_ids.tolist(), self.top_logprobs.tolist()
        result: list[dict[int, float] | None] = []
        for row, k in zip(places, counts, strict=True):
            top = None if k is None else dict(zip(top_ids[row][:k], top_values[row][:k], strict=True))
            result.append(None if top is None else top | {token_ids[row]: sampled[row]})
        return result


def _on_host(tensor: Any) -> Any:
    return None if tensor is None else tensor.to("cpu", non_blocking=True, copy=True)


def sample(
    logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], ops: Ops = PLAIN
) -> SamplerOutput:
    """Choose one token a row, without waiting for the device.

    logits [S, V]; requests and positions [S]: whose row it is, and the index in its sequence of the token to choose.
    """
    rows = [row for row, request in enumerate(requests) if not request.argmax_only]
    if len(rows) == len(requests):
        token_ids = _draw(logits, requests, positions, ops)
    else:
        token_ids = ops.sample(logits)
        if rows:  # these alone take the long way
            [at] = upload(logits.device, np.array(rows))
            drawn = _draw(logits[at], [requests[row] for row in rows], [positions[row] for row in rows], ops)
            token_ids = token_ids.index_copy(0, at, drawn)
    return with_logprobs(token_ids, logits, [request.params for request in requests])


def _draw(logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], ops: Ops) -> torch.Tensor:
    """A token for each row, [S], by the options of its request."""
    params = [request.params for request in requests]
    logits = adjusted(logits, requests)
    if all(p.greedy for p in params):
        return ops.sample(logits)
    vocab = logits.shape[-1]
    columns = [
        [0.0 if p.greedy else p.temperature for p in params],
        [min(p.top_k or vocab, vocab) for p in params],
        [p.top_p if p.top_p < 1.0 else 2.0 for p in params],
        [p.min_p for p in params],
        [uniform(r.seed, position) for r, position in zip(requests, positions, strict=True)],
    ]
    [settings] = upload(logits.device, np.array(columns))  # [5, S], float64
    if any(p.filters for p in params):
        logits = filter_logits(logits, *settings[:4].float()[..., None])
    return ops.sample(logits, settings[0].float(), settings[4])


def with_logprobs(token_ids: torch.Tensor, raw: torch.Tensor, params: Sequence[SamplingParams]) -> SamplerOutput:
    """The tokens drawn, [S], and the log-probabilities that any row asked for, of the model's own logits [S, V]."""
    if all(p.logprobs is None for p in params):
        return SamplerOutput(token_ids)
    return scored(token_ids, raw, max(p.logprobs or 0 for p in params))


def scored(token_ids: torch.Tensor, raw: torch.Tensor, k: int) -> SamplerOutput:
    """These tokens [S] with their log-probabilities, and those of the k likeliest, under the model's own logits."""
    logprobs = raw.float().log_softmax(dim=-1)
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    sampled = logprobs.gather(-1, token_ids[:, None])[:, 0]
    return SamplerOutput(token_ids, top.indices, top.values, sampled)
