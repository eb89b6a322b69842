"""How one request chooses its tokens, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import refuse_unknown_options, require

MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5
"""A temperature this small leaves only the likeliest token, and dividing by it would overflow."""


@refuse_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; values out of range raise `UserError`.

    n: so many samples of the same prompt; from m3 on they share the blocks of the prompt.
    max_tokens, min_tokens: most and fewest tokens to generate; no EOS or stop token is sampled before min_tokens.
    temperature: 0 (or below `GREEDY_BELOW`) is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens (0: all). top_p: keep the smallest set of likeliest tokens that reaches this
        probability, the token that crosses it included. min_p: keep tokens at least this likely, relative to the
        likeliest one.
    repetition_penalty: > 1 makes every token seen in prompt or output less likely (CTRL, section 4.1).
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens of the output.
    stop: texts that end the output (not part of it). stop_token_ids: tokens that end it, beside the model's EOS ids.
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
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("n", "max_tokens", "min_tokens", "top_k"):
            require(_is_whole(getattr(self, name)), f"{name} must be a whole number")
        for name in ("seed", "logprobs"):
            value = getattr(self, name)
            require(value is None or _is_whole(value), f"{name} must be a whole number or None, not {value!r}")
        require(self.n >= 1, f"n must be at least 1, not {self.n}")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), not {self.min_tokens}",
        )
        require(self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}")
        self._range("temperature", 0.0, 100.0)
        self._range("top_p", 0.0, 1.0)
        require(self.top_p > 0.0, "top_p must be greater than 0 (1 switches it off)")
        self._range("min_p", 0.0, 1.0)
        self._range("repetition_penalty", 0.0, 100.0)
        require(self.repetition_penalty > 0.0, "repetition_penalty must be greater than 0 (1 switches it off)")
        self._range("presence_penalty", -2.0, 2.0)
        self._range("frequency_penalty", -2.0, 2.0)
        require(all(isinstance(s, str) and s for s in stop), "stop takes texts that are not empty")
        require(all(_is_whole(t) and t >= 0 for t in self.stop_token_ids), "stop_token_ids takes token ids >= 0")
        require(self.seed is None or 0 <= self.seed < 2**63, f"seed must be in 0 ... 2**63-1, not {self.seed}")
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs must be in 0 ... {MAX_LOGPROBS}, not {self.logprobs}",
        )

    def _range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        valid = number and math.isfinite(value) and low <= value <= high
        require(valid, f"{name} must be a number in {low:g} ... {high:g}, not {value!r}")

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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
