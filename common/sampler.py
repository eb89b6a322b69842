"""Logits to tokens, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.models.ops import Ops
from common.request import Request, SampledToken
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

    def to_host(self, requests: Sequence[Request]) -> list[SampledToken]:
        token_ids: list[int] = self.token_ids.tolist()
        if self.sampled_logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return [SampledToken(token_id) for token_id in token_ids]
        sampled: list[float] = self.sampled_logprobs.tolist()
        top_ids: list[list[int]] = self.top_ids.tolist()
        top_values: list[list[float]] = self.top_logprobs.tolist()
        result: list[SampledToken] = []
        for row, request in enumerate(requests):
            k = request.params.logprobs
            if k is None:
                result.append(SampledToken(token_ids[row]))
                continue
            logprobs = dict(zip(top_ids[row][:k], top_values[row][:k], strict=True))
            logprobs[token_ids[row]] = sampled[row]
            result.append(SampledToken(token_ids[row], logprobs))
        return result


def sample(
    logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], ops: Ops = PLAIN
) -> SamplerOutput:
    """Choose one token a row.

    logits [S, V]; requests and positions [S]: whose row it is, and the index in its sequence of the token to choose.
    """
    params = [request.params for request in requests]
    raw = logits
    logits = _penalise(logits, requests)
    if all(p.greedy for p in params):
        token_ids = ops.pick(logits)
    else:
        noise = [uniform(r.seed, position) for r, position in zip(requests, positions, strict=True)]
        degrees = [0.0 if p.greedy else p.temperature for p in params]
        token_ids = ops.pick(
            _filter(logits, params),
            torch.tensor(degrees, dtype=torch.float32, device=logits.device),
            torch.tensor(noise, dtype=torch.float64, device=logits.device),
        )
    if all(p.logprobs is None for p in params):
        return SamplerOutput(token_ids)
    logprobs = raw.float().log_softmax(dim=-1)
    k = max(p.logprobs or 0 for p in params)
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    sampled = logprobs.gather(-1, token_ids[:, None])[:, 0]
    return SamplerOutput(token_ids, top.indices, top.values, sampled)


def _filter(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The logits, -inf where top_k, top_p or min_p leave a token out."""
    by_rank, by_share = any(p.top_k or p.top_p < 1.0 for p in params), any(p.min_p for p in params)
    if not by_rank and not by_share:
        return logits

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    logits = logits.float()
    kept = logits / column([1.0 if p.greedy else p.temperature for p in params])
    if by_rank:
        vocab = logits.shape[-1]
        top_k = column([p.top_k or vocab for p in params])
        ranked, order = kept.sort(dim=-1, descending=True, stable=True)
        ranked = ranked.masked_fill(torch.arange(vocab, device=logits.device) >= top_k, -torch.inf)
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # the token that crosses top_p has less than top_p before it: it stays
        ranked = ranked.masked_fill(before >= column([p.top_p if p.top_p < 1.0 else 2.0 for p in params]), -torch.inf)
        kept = torch.empty_like(kept).scatter_(-1, order, ranked)
    if by_share:
        probs = kept.softmax(dim=-1)
        floor = probs.amax(dim=-1, keepdim=True) * column([p.min_p for p in params])
        kept = kept.masked_fill(probs < floor, -torch.inf)
    return logits.masked_fill(kept == -torch.inf, -torch.inf)


def _penalise(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Penalties and min_tokens, for the rows that ask for them; the input is left as it was."""
    result = logits
    for row, request in enumerate(requests):
        p = request.params
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        banned = request.num_output_tokens + request.num_pending_tokens <= p.min_tokens and p.min_tokens > 0
        if not penalised and not banned:
            continue
        if result is logits:
            result = logits.float().clone()
        if penalised:
            _penalise_row(result[row], request)
        if banned:
            ends = [*p.stop_token_ids, *(() if p.ignore_eos else request.eos_token_ids)]
            result[row, torch.tensor([t for t in ends if t < result.shape[-1]], dtype=torch.long)] = -torch.inf
    return result


def _penalise_row(row: torch.Tensor, request: Request) -> None:
    p = request.params
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    output = request.output_token_ids
    if output:
        tokens, counts = torch.tensor(output, device=row.device).unique(return_counts=True)
        row[tokens] -= p.presence_penalty + p.frequency_penalty * counts
