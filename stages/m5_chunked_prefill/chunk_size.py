"""How many prompt tokens a step computes while somebody decodes."""

from __future__ import annotations

import time

from common.plan import StepPlan


class ChunkSize:
    """A fixed number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def observe(self, plan: StepPlan) -> None:
        """A step has ended: nothing to learn from it."""


class AutoChunkSize(ChunkSize):
    """As many tokens as fit into `target` seconds, the wished-for time between two tokens of those who decode.

    Two running averages are measured: the seconds of a step that only decodes, and what each prompt token adds. The
    second one grows with the prompt (a later chunk attends to more tokens), and the size follows it.
    """

    FIRST = 256  # before anything is measured
    UNIT = 16  # sizes are multiples of it, and at least so many tokens go on however slow the decodes are
    MOST = 8192
    WEIGHT = 0.25  # of the newest step in the averages

    def __init__(self, target: float) -> None:
        super().__init__(self.FIRST)
        self.target = target
        self._decode_seconds: float | None = None
        self._token_seconds: float | None = None
        self._last_end = 0.0

    def observe(self, plan: StepPlan) -> None:
        """A step has ended. It began when it was planned or, where it was planned ahead, when the one before ended."""
        now = time.perf_counter()
        seconds = now - max(plan.planned_at, self._last_end)
        self._last_end = now
        decodes = sum(chunk.length == 1 for chunk in plan.chunks)
        prompt_tokens = plan.num_tokens - decodes
        if not prompt_tokens:
            self._decode_seconds = self._average(self._decode_seconds, seconds)
        elif prompt_tokens >= self.UNIT and (self._decode_seconds is not None or not decodes):
            beside = self._decode_seconds if decodes and self._decode_seconds else 0.0
            self._token_seconds = self._average(self._token_seconds, max(seconds - beside, 0.0) / prompt_tokens)
        if self._decode_seconds is not None and self._token_seconds:
            fitting = (self.target - self._decode_seconds) / self._token_seconds
            self.tokens = max(self.UNIT, min(self.MOST, int(fitting) // self.UNIT * self.UNIT))

    def _average(self, old: float | None, new: float) -> float:
        return new if old is None else (1 - self.WEIGHT) * old + self.WEIGHT * new
