"""What happens in one step: the scheduler writes it, the runner executes it, the trace records it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.request import Request
from common.watch import clock

BlockCopies = list[tuple[int, int]]  # (source, destination) pairs of block numbers


@dataclass(slots=True)
class Chunk:
    """Tokens `start ... start + length - 1` of one request, to compute in this step. A decode is a chunk of length 1.

    `block_table`: the blocks in which the KV cache keeps the request (empty without a cache).
    `samples`: the chunk reaches the last token, so its logits choose the next one.
    `idle`: a finished request that a static batch carries along; its result is not read.
    `forks`: requests that share the prompt and start here, each drawing its own token from the same logits (n > 1).
    """

    request: Request
    start: int
    length: int
    block_table: Sequence[int] = ()
    samples: bool = True
    idle: bool = False
    forks: Sequence[Request] = ()

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def kind(self) -> str:
        """`prefill`, `decode`, `recompute` (generated tokens computed again) or `idle`."""
        if self.idle:
            return "idle"
        if self.end <= self.request.num_prompt_tokens:
            return "recompute" if self.request.num_preemptions else "prefill"
        return "decode" if self.length == 1 else "recompute"

    @property
    def waits_for_token(self) -> bool:
        """Its last token is one that a step in flight samples: it is on the device, and not known here yet."""
        return self.start + self.length > len(self.request.token_ids)

    @property
    def scored(self) -> range:
        """Positions of the prompt behind which a known token's log-probability is wanted, and not known yet."""
        request, known = self.request, self.request.prompt_logprobs
        first = self.end if known is None else max(self.start, len(known) - 1)
        return range(first, min(self.end, request.num_prompt_tokens - 1))

    def token_ids(self) -> list[int]:
        """One fewer than `length` if it `waits_for_token`."""
        return self.request.token_ids[self.start : self.end]


@dataclass(slots=True)
class StepPlan:
    """One step.

    `padded_tokens`: positions of padding and of finished requests. What moves before anything is computed, in this
    order: `swap_out` (blocks to the CPU pool), `swap_in` (back), `copies` (of shared blocks that are about to be
    written). `preempted`: requests that lost their blocks; `resumed`: requests back from the CPU pool. `planned_at`:
    when planning began, on `common.watch.clock`.
    """

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    padded_tokens: int = 0
    preempted: list[Request] = field(default_factory=list[Request])
    resumed: list[Request] = field(default_factory=list[Request])
    swap_out: BlockCopies = field(default_factory=list[tuple[int, int]])
    swap_in: BlockCopies = field(default_factory=list[tuple[int, int]])
    copies: BlockCopies = field(default_factory=list[tuple[int, int]])
    planned_at: float = field(default_factory=clock.now)

    @property
    def drawing(self) -> list[Request]:
        """Who gets a token: for each chunk that samples its request, and those that fork there."""
        return [r for c in self.chunks if c.samples for r in ((c.request, *c.forks) if c.forks else (c.request,))]

    @property
    def scores_prompts(self) -> bool:
        """Does any chunk hold positions of a prompt whose logits are wanted?"""
        return any(c.request.prompt_logprobs is not None and c.scored for c in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Positions whose results count."""
        return sum(chunk.length for chunk in self.chunks if not chunk.idle)
