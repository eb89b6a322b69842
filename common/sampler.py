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
from common.sampling_params import SamplingParams
from common.structure import allowed

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
        return SamplerOutput(*(_on_host(getattr(self, field.name)) for field in fields(self)))

    def to_host(self, requests: Sequence[Request], places: Sequence[int]) -> list[SampledToken]:
        """places: where each request's token is."""
        token_ids: list[int] = self.token_ids.tolist()
        if self.sampled_logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return [SampledToken(token_ids[place]) for place in places]
        sampled: list[float] = self.sampled_logprobs.tolist()
        top_ids: list[list[int]] = self.top_ids.tolist()
        top_values: list[list[float]] = self.top_logprobs.tolist()
        result: list[SampledToken] = []
        for row, request in zip(places, requests, strict=True):
            k, logprobs = request.params.logprobs, None
            if k is not None:
                top = zip(top_ids[row][:k], top_values[row][:k], strict=True)
                logprobs = dict(top) | {token_ids[row]: sampled[row]}
            result.append(SampledToken(token_ids[row], logprobs))
        return result


def _on_host(tensor: Any) -> Any:
    return None if tensor is None else tensor.to("cpu", non_blocking=True, copy=True)


def sample(
    logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], ops: Ops = PLAIN
) -> SamplerOutput:
    """Choose one token a row, without waiting for the device.

    logits [S, V]; requests and positions [S]: whose row it is, and the index in its sequence of the token to choose.
    """
    if all(request.argmax_only for request in requests):
        return SamplerOutput(ops.sample(logits))
    params = [request.params for request in requests]
    raw = logits
    logits = _restrict(_penalise(_add_bias(logits, requests), requests), requests)
    if all(p.greedy for p in params):
        token_ids = ops.sample(logits)
    else:
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
        token_ids = ops.sample(logits, settings[0].float(), settings[4])
    return with_logprobs(token_ids, raw, params)


def with_logprobs(token_ids: torch.Tensor, raw: torch.Tensor, params: Sequence[SamplingParams]) -> SamplerOutput:
    """The tokens drawn, [S], and the log-probabilities that any row asked for, of the model's own logits [S, V]."""
    if all(p.logprobs is None for p in params):
        return SamplerOutput(token_ids)
    logprobs = raw.float().log_softmax(dim=-1)
    k = max(p.logprobs or 0 for p in params)
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    sampled = logprobs.gather(-1, token_ids[:, None])[:, 0]
    return SamplerOutput(token_ids, top.indices, top.values, sampled)


def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The logits [S, V], -inf where the others, each [S, 1], leave a token out. Off: top_k V, top_p 2, min_p 0."""
    logits = logits.float()
    kept = _by_rank(logits / torch.where(temperature > 0, temperature, 1.0), top_k, top_p)
    probs = kept.softmax(dim=-1)
    floor = probs.amax(dim=-1, keepdim=True) * min_p
    return logits.masked_fill((kept == -torch.inf) | (probs < floor), -torch.inf)


def _by_rank(kept: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature, -inf where top_k and then top_p leave a token out."""
    ranked, order = kept.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(kept.shape[-1], device=kept.device) >= top_k, -torch.inf)
    probs = ranked.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # the token that crosses top_p has less than top_p before it: it stays
    before[..., 0] = -1.0  # and so does the first one, also where float32 knows top_p as 0
    ranked = ranked.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(kept).scatter_(-1, order, ranked)


def _restrict(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """-inf where a token does not fit a row's structure; the input is left as it was."""
    masks = [(row, request.structure.mask()) for row, request in enumerate(requests) if request.structure is not None]
    if not masks:
        return logits
    rows, words = upload(logits.device, np.array([row for row, _ in masks]), np.stack([mask for _, mask in masks]))
    return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed(words, logits.shape[-1]), -torch.inf))


def _add_bias(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """`logit_bias` of the rows that have one; the input is left as it was."""
    biased = [(row, t, b) for row, r in enumerate(requests) for t, b in r.params.logit_bias.items()]
    if not biased:
        return logits
    rows, tokens, values = upload(logits.device, *np.array(biased, dtype=np.float64).T)
    at = rows.long(), tokens.long()
    return logits.index_put(at, biased_logits(logits[at], values))


def biased_logits(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rounded again as they were."""
    return (logits.float() + bias.float()).to(logits.dtype)


def _penalise(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Penalties and min_tokens, for the rows that ask for them; the input is left as it was."""
    penalised = [(row, request) for row, request in enumerate(requests) if request.penalised]
    banned = [(row, token) for row, request in enumerate(requests) for token in _banned(request, logits.shape[-1])]
    if not penalised and not banned:
        return logits
    result = logits.clone()
    histories = [np.array(request.token_ids) for _, request in penalised]
    pairs = np.array(banned, dtype=np.int64).reshape(-1, 2).T
    rows, tokens, *seen = upload(logits.device, *pairs, *histories)
    for (row, request), history in zip(penalised, seen, strict=True):
        p, count = request.params, request.num_prompt_tokens
        in_prompt, in_output = (torch.zeros_like(result[row], dtype=torch.float32) for _ in range(2))
        in_prompt.index_fill_(0, history[:count], 1.0)
        in_output.index_add_(0, history[count:], torch.ones_like(history[count:], dtype=torch.float32))
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        result[row] = apply_penalties(result[row], in_prompt + in_output > 0, in_output, *penalties)
    result[rows, tokens] = -torch.inf
    return result


def apply_penalties(
    logits: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor,
    repetition: torch.Tensor | float, presence: torch.Tensor | float, frequency: torch.Tensor | float,
) -> torch.Tensor:  # fmt: skip
    """logits [..., V], rounded again as they were. seen: is the token in prompt or output; counts: in the output."""
    values = logits.float()
    values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
    return (values - ((counts > 0) * presence + counts * frequency)).to(logits.dtype)


def _banned(request: Request, vocab_size: int) -> list[int]:
    """Before `min_tokens`: what would end the output. A structure knows it."""
    if request.structure is not None:
        return []
    few = request.num_output_tokens + request.num_unseen_tokens <= request.params.min_tokens
    return [t for t in ending_ids(request) if t < vocab_size] if few and request.params.min_tokens else []


def ending_ids(request: Request) -> tuple[int, ...]:
    """The tokens that end the output."""
    return (*request.params.stop_token_ids, *(() if request.params.ignore_eos else request.eos_token_ids))
