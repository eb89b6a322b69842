"""How one request chooses its tokens, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import refuse_unknown_options, require, require_number

MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5
"""A temperature this small leaves only the likeliest token, and dividing by it would overflow."""


@refuse_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; values out of range raise `UserError`.

    n: the number of samples of the prompt; from m3 on they share the blocks of the prompt.
    max_tokens, min_tokens: most and fewest tokens to generate; no EOS or stop token is sampled before min_tokens.
    temperature: 0 (or below `GREEDY_BELOW`) is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens (0: all). top_p: keep the smallest set of likeliest tokens that reaches this
        probability, the token that crosses it included. min_p: keep tokens at least this likely, relative to the
        likeliest one.
    repetition_penalty: > 1 makes every token seen in prompt or output less likely (CTRL, section 4.1).
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens of the output.
    stop: texts that end the output (not part of it). stop_token_ids: tokens that end it, as the model's EOS ids do.
    ignore_eos: the model's EOS ids do not end the output.
    seed: the request's own noise; None takes one derived from the engine's seed.
    logprobs: for each token also return the k likeliest log-probabilities (0: the sampled token's alone; None: none).
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.stop, Sequence), "stop takes a text or a list of texts")
        require(isinstance(self.stop_token_ids, Sequence), "stop_token_ids takes a list of token ids")
        object.__setattr__(self, "stop", self.stop_strings)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, least in (("n", 1), ("max_tokens", 1), ("min_tokens", 0), ("top_k", 0)):
            require_number(name, getattr(self, name), int, least)
        least, most = self.min_tokens, self.max_tokens
        require(least <= most, f"min_tokens must be at most max_tokens ({most}), not {least}")
        require_number("temperature", self.temperature, int | float, 0, 100)
        require_number("top_p (1 switches it off)", self.top_p, int | float, 0, 1, above=True)
        require_number("min_p", self.min_p, int | float, 0, 1)
        penalty = self.repetition_penalty
        require_number("repetition_penalty (1 switches it off)", penalty, int | float, 0, 100, above=True)
        require_number("presence_penalty", self.presence_penalty, int | float, -2, 2)
        require_number("frequency_penalty", self.frequency_penalty, int | float, -2, 2)
        require(all(isinstance(s, str) and s for s in self.stop), "stop takes texts that are not empty")
        for token_id in self.stop_token_ids:
            require_number("each of stop_token_ids", token_id, int, 0)
        if self.seed is not None:
            require_number("seed", self.seed, int, 0, 2**63 - 1)
        if self.logprobs is not None:
            require_number("logprobs", self.logprobs, int, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple that it was normalised to."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
