"""How many prompt tokens a step computes next to decodes."""

from common.config import EngineConfig
from common.plan import StepPlan
from common.watch import clock

DEFAULT_TOKENS = {"cpu": 256, "cuda": 1024}
"""A GPU computes hundreds of tokens while it reads its weights once: small chunks waste it. On the CPU the sweep of
`interference` bends at 256."""


class ChunkSize:
    """A fixed number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def observe(self, plan: StepPlan) -> None:
        """A step has ended: nothing to learn from it."""


def choose_chunk_size(config: EngineConfig) -> ChunkSize:
    size = config.prefill_chunk_size
    if size == "auto":
        return AutoChunkSize(config.target_itl)
    return ChunkSize(int(size) if size is not None else DEFAULT_TOKENS[config.torch_device.type])


class AutoChunkSize(ChunkSize):
    """As many tokens as fit into `target` seconds, the time wanted between two tokens of a request.

    Two running averages are measured: the seconds of a step that only decodes, and what each prompt token adds. The
    second one grows with the prompt (a later chunk attends to more tokens), and the size follows it. Any error in the
    first one is charged to the prompt tokens, so step time still converges to `target`, only more slowly.
    """

    FIRST = 256  # before anything is measured
    UNIT = 16  # sizes are multiples of it, and it is the smallest size, however slow the decodes are
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
        now = clock.now()
        seconds = now - max(plan.planned_at, self._last_end)
        self._last_end = now
        decodes = sum(chunk.length == 1 for chunk in plan.chunks)
        prompt_tokens = plan.num_tokens - decodes
        if not prompt_tokens:
            self._decode_seconds = self._average(self._decode_seconds, seconds)
        elif decodes and seconds < (self._decode_seconds or 0.0):  # that average is stale
            self._decode_seconds = self._average(self._decode_seconds, 0.0)
        elif prompt_tokens >= self.UNIT:
            others = self._decode_seconds or 0.0 if decodes else 0.0
            self._token_seconds = self._average(self._token_seconds, (seconds - others) / prompt_tokens)
        if self._token_seconds:
            fitting = (self.target - (self._decode_seconds or 0.0)) / self._token_seconds
            self.tokens = max(self.UNIT, min(self.MOST, int(fitting) // self.UNIT * self.UNIT))

    def _average(self, old: float | None, new: float) -> float:
        return new if old is None else (1 - self.WEIGHT) * old + self.WEIGHT * new
