"""What a request's options do to logits before a token is chosen: structure, bias, penalties, and tokens left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from common.execution.upload import upload
from common.request import Request
from common.sampling.structure import allowed


def adjusted(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """logits [S, V] with what does not depend on the temperature; the input is left as it was."""
    return _restrict(_penalise(_add_bias(logits, requests), requests), requests)


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
    few = request.num_tokens - request.num_prompt_tokens <= request.params.min_tokens
    return [t for t in ending_ids(request) if t < vocab_size] if few and request.params.min_tokens else []


def ending_ids(request: Request) -> tuple[int, ...]:
    """The tokens that end the output."""
    return (*request.params.stop_token_ids, *(() if request.params.ignore_eos else request.eos_token_ids))
