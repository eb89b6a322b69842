"""One sequence on its way through an engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from common.sampling.structure import Structure
from common.sampling_params import SamplingParams
from common.text.detokenizer import Detokenizer


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class SampledToken(NamedTuple):
    """What the sampler returns for one row: a token, and log-probabilities where the request asked for them."""

    token_id: int
    logprobs: dict[int, float] | None = None


@dataclass(eq=False)
class Request:
    """Token ids and progress of one sequence. The KV cache knows where its keys and values lie; the request does not.

    `num_computed_tokens` is the one progress counter: the tokens whose keys and values are cached (or will be, once
    the steps in flight are done). What a step has to compute is `num_tokens - num_computed_tokens`: the whole prompt
    at first, one token in each decode step, everything again after a preemption.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int]
    seed: int
    arrival_time: float
    output_id: str = ""  # the id that the caller knows: all samples of a prompt (n > 1) have the same
    number: int = 0  # counts requests in order of arrival
    priority: int = 0
    prompt: str | None = None
    cache_salt: str | None = None  # only requests with the same one share cached beginnings
    detokenizer: Detokenizer | None = None
    structure: Structure | None = None  # what the output has to fit

    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_open_chunks: int = 0  # planned, not yet updated; its memory is freed only once this is 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # prompt tokens that were in the prefix cache when it first started
    abort_requested: bool = False
    siblings: list[Request] = field(default_factory=list["Request"])  # n > 1: they fork as its end is planned
    finish_reason: str | None = None
    scheduled_time: float | None = None
    finish_time: float | None = None
    token_ids: list[int] = field(init=False)
    num_tokens: int = field(init=False)  # prompt and output, tokens still in flight included
    max_num_tokens: int = field(init=False)  # prompt and output, when it ends
    penalised: bool = field(init=False)  # its logits depend on all tokens before
    argmax_only: bool = field(init=False)  # greedy, and no option needs the logits
    end_token_ids: frozenset[int] = field(init=False)  # each is an end by itself, and no part of the text
    token_times: list[float] = field(default_factory=list[float])
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None  # of the tokens scored so far; the first has none

    def __post_init__(self) -> None:
        p = self.params
        self.token_ids = list(self.prompt_token_ids)
        self.num_tokens = len(self.token_ids)
        self.max_num_tokens = len(self.prompt_token_ids) + max(1, p.max_tokens)
        self.penalised = p.penalised
        eos = () if p.ignore_eos and self.structure is None else self.eos_token_ids
        self.end_token_ids = frozenset((*p.stop_token_ids, *eos))
        changed = p.penalised or p.logit_bias or p.min_tokens or self.structure is not None
        self.argmax_only = p.greedy and not changed and p.logprobs is None
        if self.params.logprobs is not None:
            self.logprobs = []
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_unseen_tokens(self) -> int:
        """Sampled on the device, not on the host yet."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def ends_in_flight(self) -> bool:
        """Nothing of it is left to plan: its last token is being computed, or an abort waits for the step in flight."""
        return self.abort_requested or self.num_tokens >= self.max_num_tokens

    @property
    def rests(self) -> bool:
        """What may come next depends on a token that is not known yet: it sits out the steps planned until then."""
        return self.structure is not None and self.num_unseen_tokens > 0

    def append(self, sampled: SampledToken, now: float) -> None:
        """Take a sampled token and decide whether it was the last one."""
        if self.params.max_tokens == 0:  # it was wanted for its prompt alone
            self.num_tokens -= 1
            self.finish_reason = "length"
            return
        self.token_ids.append(sampled.token_id)
        self.token_times.append(now)
        if self.logprobs is not None and sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        self.finish_reason = self._stop_reason(sampled.token_id)

    def _stop_reason(self, token_id: int) -> str | None:
        params = self.params
        if self.structure is not None:
            self.structure.advance(token_id)
            if self.structure.failed or self.structure.complete:
                return "abort" if self.structure.failed else "stop"
        length = len(self.token_ids)
        if length >= len(self.prompt_token_ids) + params.min_tokens:
            if token_id in self.end_token_ids:
                return "stop"
            if params.stop and self.detokenizer is not None and self.detokenizer.finds_stop(self.token_ids):
                return "stop"
        return "length" if length >= self.max_num_tokens else None
