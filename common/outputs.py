"""What an engine returns."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

from common.request import Request


class CompletionOutput:
    """One sample of a request, as it was when the engine returned it. Computed on access: most are never read."""

    def __init__(self, request: Request, index: int, num_tokens: int, finish_reason: str | None) -> None:
        """`num_tokens`: prompt and output, when the engine returned it."""
        self._request = request
        self.num_generated = num_tokens - request.num_prompt_tokens  # also what a stop string has cut off
        self.index = index
        self.finish_reason = finish_reason

    @cached_property
    def token_ids(self) -> list[int]:
        """The generated tokens, without the prompt. With stop strings, those of `text`: up to the one where it ends."""
        start = self._request.num_prompt_tokens
        return self._request.token_ids[start : start + self._num_returned]

    @cached_property
    def text(self) -> str:
        """Decoded output; empty for a model without a tokenizer."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[str, int]:
        """The text, and of how many tokens it is."""
        request, finished = self._request, self.finish_reason is not None
        if request.detokenizer is None:
            return "", self.num_generated
        ends = self.finish_reason == "stop" and request.token_ids[-1] in request.end_token_ids
        last = int(ends)  # an end token is no text
        text, count = request.detokenizer.read(request.token_ids, self.num_generated - last, finished)
        return text, count + last

    @property
    def failure(self) -> str | None:
        """Why the answer could not go on within its structure; it has been aborted then."""
        return self._request.structure and self._request.structure.failed

    @property
    def _num_returned(self) -> int:
        return self._read[1] if self._request.params.stop_strings else self.num_generated

    @property
    def readable(self) -> str:
        """The text; for a model without a tokenizer the token ids."""
        return self.text if self._request.detokenizer else "".join(f"{token} " for token in self.token_ids)

    @cached_property
    def logprobs(self) -> list[dict[int, float]] | None:
        """For each token a dict of token id to log-probability under the model's raw distribution."""
        return None if self._request.logprobs is None else self._request.logprobs[: self._num_returned]

    @property
    def text_offsets(self) -> list[int]:
        """Where in `readable` each token's text begins; for part of a character, where the character does."""
        request = self._request
        if request.detokenizer is None:
            return [0, *accumulate(len(f"{token} ") for token in self.token_ids[:-1])][: len(self.token_ids)]
        return request.detokenizer.offsets(request.token_ids, self._num_returned, len(self.text))

    @cached_property
    def token_times(self) -> list[float]:
        """When each token came, in seconds on `time.perf_counter()`'s clock."""
        return self._request.token_times[: self._num_returned]

    def times_from(self, start: int) -> list[float]:
        """The times of all generated tokens from token `start` on, without copying the others."""
        return self._request.token_times[start : self.num_generated]


class RequestOutput:
    """Result of a request, whole (`finish_reason` is set) or so far (it is None).

    Times are in seconds. `ttft`: arrival to first token; `itl`: between neighbouring tokens, one value fewer than
    tokens; `tpot`: their mean; `queue_time`: arrival to first scheduling; `e2e`: arrival to end. None where it has
    not happened yet.
    """

    def __init__(self, samples: Sequence[Request]) -> None:
        """Notes the progress, and no more: there is one for each request in each step."""
        self._first = samples[0]
        self._samples = samples
        self._progress = [(len(request.token_ids), request.finish_reason) for request in samples]
        self.request_id = self._first.id
        self.finished = None not in [reason for _, reason in self._progress]
        self._finish_time = max(r.finish_time or 0.0 for r in samples) if self.finished else None

    @cached_property
    def outputs(self) -> list[CompletionOutput]:
        """The samples, in order."""
        progress = zip(self._samples, self._progress, strict=True)
        return [CompletionOutput(request, index, *how) for index, (request, how) in enumerate(progress)]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._first.prompt_token_ids

    @property
    def prompt(self) -> str | None:
        return self._first.prompt

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `abort`; None while tokens are still to come."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        return self.outputs[0].logprobs

    @property
    def prompt_logprobs(self) -> list[dict[int, float] | None] | None:
        """For each token of the prompt, as `logprobs`; None for the first one, which follows nothing."""
        return self._first.prompt_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had (from m6 on)."""
        return self._first.num_cached_tokens

    @property
    def num_generated(self) -> int:
        """Tokens of all samples, also those that a stop string has cut off: they have been computed."""
        return sum(sample.num_generated for sample in self.outputs)

    @property
    def arrival_time(self) -> float:
        return self._first.arrival_time

    @property
    def ttft(self) -> float | None:
        times = self.outputs[0].times_from(0)
        return times[0] - self._first.arrival_time if times else None

    @property
    def itl(self) -> list[float]:
        times = self.outputs[0].token_times
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def tpot(self) -> float | None:
        gaps = self.itl
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def queue_time(self) -> float | None:
        scheduled = self._first.scheduled_time
        return None if scheduled is None else scheduled - self._first.arrival_time

    @property
    def e2e(self) -> float | None:
        return None if self._finish_time is None else self._finish_time - self._first.arrival_time

    def __repr__(self) -> str:
        return f"RequestOutput({self.request_id!r}, {self.text!r}, finish_reason={self.finish_reason!r})"
