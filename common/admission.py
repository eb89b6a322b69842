"""What comes in: a prompt becomes requests, or a clear error before anything is queued."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from common.config import EngineConfig
from common.errors import plain, require
from common.models import Decoder
from common.request import Request
from common.sampler import mix
from common.sampling.structure import Structures
from common.sampling_params import SamplingParams
from common.scheduler import Scheduler
from common.text.detokenizer import Detokenizer
from common.text.prompts import Prompt, encode_prompt
from common.text.tokenizer import ChatPrompt, Tokenizer
from common.watch import clock


class Admission:
    """Checks and numbers the requests of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        model: Decoder,
        tokenizer: Tokenizer | None,
        max_model_len: int,
    ) -> None:
        self._seed = config.seed
        self._scheduler = scheduler
        self._model = model
        self._max_model_len = max_model_len
        config_ends, known = model.config.eos_token_ids, tokenizer
        ends = {*config_ends, *known.eos_token_ids, *known.turn_end_token_ids} if known else config_ends
        self.structures = Structures(tokenizer, model.config.vocab_size, ends)
        self._samples = itertools.count()

    def samples(
        self,
        prompt: Prompt,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        number: int,
        request_id: str,
        priority: int,
        arrival_time: float | None,
        cache_salt: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[Request]:
        """The `params.n` samples of a prompt. Raises `UserError` for whatever can never run."""
        priority, arrival_time = plain(priority), plain(arrival_time)
        times = isinstance(arrival_time or 0.0, int | float) and isfinite(arrival_time or 0.0)
        wrong = f"not {priority!r} and {arrival_time!r}"
        known = isinstance(priority, int) and times
        require(known, f"priority is a whole number and arrival_time a time in seconds, {wrong}")
        known = cache_salt is None or (isinstance(cache_salt, str) and bool(cache_salt))
        require(known, f"cache_salt is a text that is not empty, or None, not {cache_salt!r}")
        token_ids = encode_prompt(prompt, tokenizer, self._model.config.vocab_size, chat_template_kwargs)
        self._check_room(len(token_ids), params)
        without = "stop strings need a tokenizer, and this model has none: use stop_token_ids"
        require(not params.stop_strings or tokenizer is not None, without)
        end_token_ids = set(self._model.config.eos_token_ids)
        if tokenizer is not None:
            params = _with_stop_tokens(params, tokenizer)
            end_token_ids |= set(tokenizer.eos_token_ids)
            if isinstance(token_ids, ChatPrompt):  # any other text may hold several turns
                end_token_ids |= tokenizer.turn_end_token_ids
        vocab = self._model.config.vocab_size
        unknown = [token for token in params.logit_bias if token >= vocab]
        require(not unknown, f"logit_bias names tokens that the model's vocabulary of {vocab} has not: {unknown[:5]}")
        seed = params.seed if params.seed is not None else mix(self._seed, number)
        stops = params.stop_strings, params.min_tokens
        samples = [
            Request(
                id=request_id if index == 0 else f"{request_id}#{index}",
                output_id=request_id,
                number=next(self._samples),
                prompt_token_ids=token_ids,
                params=params,
                eos_token_ids=frozenset(end_token_ids),
                seed=seed if index == 0 else mix(seed, -1 - index),
                arrival_time=clock.now() if arrival_time is None else arrival_time,
                priority=priority,
                prompt=prompt if isinstance(prompt, str) else None,
                cache_salt=cache_salt,
                detokenizer=tokenizer and Detokenizer(tokenizer.backend, len(token_ids), *stops),
                structure=self.structures.begin(params, {*params.stop_token_ids, *end_token_ids}),
            )
            for index in range(params.n)
        ]
        for sample in samples[1:]:
            sample.prompt_logprobs = None  # the first one's are those of all
        return samples

    def _check_room(self, num_tokens: int, params: SamplingParams) -> None:
        wanted = max(1, params.max_tokens)  # the step behind a prompt always draws
        total, most = num_tokens + wanted, self._scheduler.max_num_seqs
        length = f"the prompt has {num_tokens} tokens; with max_tokens={wanted} that is {total}"
        hint = "shorten the prompt or lower max_tokens"
        require(total <= self._max_model_len, f"{length}, over max_model_len={self._max_model_len}: {hint}")
        require(params.n <= most, f"n={params.n} samples run together, over max_num_seqs={most}: lower n")
        too_long = f"prompt and output, {total} tokens, are more than the whole KV cache holds"
        hint = "raise kv_cache_memory, shorten the prompt, or lower max_tokens or n"
        require(self._scheduler.cache.fits(total, params.n), f"{too_long}: {hint}")


def _with_stop_tokens(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """An answer's text has no special tokens: a stop string that is one also becomes a stop token, and one that has one
    among other text can never match."""
    special = tokenizer.special_ids if params.stop_strings else {}
    for stop in params.stop_strings if any(text in stop for stop in params.stop_strings for text in special) else ():
        read = tokenizer.backend.encode(stop, add_special_tokens=False).ids
        inside = [text for text, token_id in special.items() if text in stop and token_id in read]
        never = f"stop {stop!r} can never match: an answer's text has no special tokens. Give {inside} alone"
        require(not inside or stop in special, never)
    ends = [special[stop] for stop in params.stop_strings if stop in special]
    return replace(params, stop_token_ids=(*params.stop_token_ids, *ends)) if ends else params
