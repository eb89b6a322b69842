"""A runner without a model: it moves numbers where a real one moves keys and values, and notices every wrong one."""

from __future__ import annotations

from collections import deque
from functools import cache

from common import Engine
from common.plan import BlockCopies, Chunk, StepPlan
from common.request import Request, SampledToken
from common.runner import Runner
from common.sampler import mix

EOS = 0
TOKENS = 24
"""The vocabulary of the fake model; every 24th token is the end."""


@cache
def expected_output(seed: int, num_prompt_tokens: int, count: int, ignore_eos: bool) -> tuple[int, ...]:
    """What a request gets, whatever runs with it and however often it is preempted."""
    tokens = [mix(seed, num_prompt_tokens + i) % TOKENS for i in range(count)]
    if EOS in tokens and not ignore_eos:
        del tokens[tokens.index(EOS) + 1 :]
    return tuple(tokens)


class FakeRunner:
    """Instead of its K and V, each slot keeps a number that stands for a token, all tokens before it, and the salt.

    Every chunk is checked against the whole context that it would read: a block that was lost, overwritten, copied
    too late or not swapped back shows up as a number that belongs to another request.
    """

    def __init__(self, real: Runner, block_size: int, num_blocks: int, num_cpu_blocks: int = 0) -> None:
        self.model, self.attention, self.device_time = real.model, real.attention, None
        self._size = block_size
        self._blocks = [[0] * block_size for _ in range(num_blocks)]
        self._cpu_blocks = [[0] * block_size for _ in range(num_cpu_blocks)]
        self._histories: dict[str, list[int]] = {}
        self._in_flight: deque[dict[str, SampledToken]] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._move(self._blocks, self._cpu_blocks, plan.swap_out)
        self._move(self._cpu_blocks, self._blocks, plan.swap_in)
        self._move(self._blocks, self._blocks, plan.copies)
        written: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            history = self._history(chunk.request)
            for position in range(chunk.start, chunk.end):
                slot = self._slot(chunk, position)
                assert slot not in written, f"two requests write slot {slot} in one step"
                written.add(slot)
                self._blocks[slot[0]][slot[1]] = history[position]
        tokens: dict[str, SampledToken] = {}
        for chunk in plan.chunks:
            history = self._history(chunk.request)
            for position in range(chunk.end):
                block, offset = self._slot(chunk, position)
                found = self._blocks[block][offset] == history[position]
                assert found, f"{chunk.request.id} reads another request's token at {position} of {chunk.end}"
            if chunk.samples:
                for request in (chunk.request, *chunk.forks):
                    tokens[request.id] = SampledToken(mix(request.seed, chunk.end) % TOKENS)
        self._in_flight.append(tokens)

    def collect(self) -> dict[str, SampledToken]:
        return self._in_flight.popleft()

    def execute(self, plan: StepPlan) -> dict[str, SampledToken]:
        self.submit(plan)
        return self.collect()

    def forget(self) -> None:
        self._in_flight.clear()

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.block_table[position // self._size], position % self._size

    def _history(self, request: Request) -> list[int]:
        """One number a position, as far as the request can ever come."""
        if request.id not in self._histories:
            prompt, most = request.prompt_token_ids, request.params.max_tokens + 1
            numbers, last = [], mix(1, sum(request.cache_salt.encode())) if request.cache_salt else 1
            for token in (*prompt, *expected_output(request.seed, len(prompt), most, True)):
                last = mix(last, token)
                numbers.append(last)
            self._histories[request.id] = numbers
        return self._histories[request.id]

    @staticmethod
    def _move(source: list[list[int]], target: list[list[int]], pairs: BlockCopies) -> None:
        assert len({to for _, to in pairs}) == len(pairs), "two blocks move to one place"
        moved = [(list(source[block]), to) for block, to in pairs]
        for content, to in moved:
            target[to] = content


def without_model(engine: Engine) -> Engine:
    """The engine with its own scheduler and cache, and a fake runner in the place of the real one."""
    usage = engine.scheduler.cache.usage()
    size = engine.config.block_size if hasattr(engine.scheduler.cache, "block_size") else engine.max_model_len
    cpu_pool = getattr(engine.scheduler.cache, "cpu_pool", None)
    fake = FakeRunner(engine.runner, size, usage.capacity // size, cpu_pool.num_blocks if cpu_pool else 0)
    engine.runner = fake  # type: ignore[assignment]
    return engine
