"""A step's plan on its way to the other ranks. Each request is described once, when it gets a slot; after that come only
the tokens and the blocks that are new, so a decode step takes about twenty bytes a request."""

import pickle
from collections.abc import Sequence

import numpy as np

from common.execution.step_inputs import RequestSlots
from common.plan import BlockCopies, Chunk, StepPlan
from common.request import Request
from common.sampling_params import SamplingParams

Entry = tuple[int, SamplingParams, int, int, list[int], bool]
"""Of a request that gets a slot: the slot, its options, seed, number of prompt tokens, all its tokens, and whether its
output has a structure, which only rank 0 follows."""
Row = tuple[int, int, int, bool, bool, int, list[int], list[int], int, list[int]]
"""Of a chunk: slot, start, length, `samples`, `idle`; how many blocks are as before, and those after them; new tokens;
how many of the prompt's have log-probabilities (-1: not asked for); slots of its forks."""
Message = tuple[list[Entry], list[Row], BlockCopies, BlockCopies, BlockCopies]
"""And what moves: `swap_out`, `swap_in`, `copies`."""


class PlanWriter:
    """Rank 0's. count: most requests of a step."""

    def __init__(self, count: int) -> None:
        self._slots = RequestSlots(count)
        self._slots.enter.append(self._enter)
        self._entries: list[Entry] = []
        self._tables: list[list[int]] = [[] for _ in range(count)]  # as the others know them
        self._known = [0] * count  # tokens

    def write(self, plan: StepPlan) -> bytes:
        requests = [r for chunk in plan.chunks for r in (chunk.request, *chunk.forks)]
        slots, at = self._slots.of(requests).tolist(), 0
        rows: list[Row] = []
        for chunk in plan.chunks:
            end = at + 1 + len(chunk.forks)
            rows.append(self._row(chunk, slots[at], slots[at + 1 : end]))
            at = end
        entries, self._entries = self._entries, []
        message: Message = (entries, rows, plan.swap_out, plan.swap_in, plan.copies)
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)

    def _enter(self, slot: int, request: Request) -> None:
        tokens, structured = list(request.token_ids), request.structure is not None
        self._entries.append((slot, request.params, request.seed, request.num_prompt_tokens, tokens, structured))
        self._tables[slot], self._known[slot] = [], len(tokens)

    def _row(self, chunk: Chunk, slot: int, forks: list[int]) -> Row:
        request, table, before = chunk.request, list(chunk.block_table), self._tables[slot]
        same = len(before) if table[: len(before)] == before else 0
        tokens, self._known[slot] = request.token_ids[self._known[slot] :], len(request.token_ids)
        self._tables[slot] = table
        scored = -1 if request.prompt_logprobs is None else len(request.prompt_logprobs)
        flags = chunk.samples, chunk.idle
        return slot, chunk.start, chunk.length, *flags, same, table[same:], tokens, scored, forks


class PlanReader:
    """The other ranks'."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._tables: dict[int, list[int]] = {}

    def read(self, message: bytes) -> StepPlan:
        found: Message = pickle.loads(message)
        entries, rows, *moves = found
        for entry in entries:
            self._enter(*entry)
        return StepPlan([self._chunk(*row) for row in rows], 0, [], [], *moves)

    def _enter(self, slot: int, params: SamplingParams, seed: int, prompt: int, tokens: list[int], fits: bool) -> None:
        request = Request(f"slot-{slot}", tokens[:prompt], params, frozenset(), seed, 0.0)
        request.token_ids = tokens
        if fits:
            request.structure, request.argmax_only = Anything(), False  # pyright: ignore[reportAttributeAccessIssue]
        self._requests[slot], self._tables[slot] = request, []

    def _chunk(
        self, slot: int, start: int, length: int, samples: bool, idle: bool, same: int, blocks: Sequence[int],
        tokens: Sequence[int], scored: int, forks: Sequence[int],
    ) -> Chunk:  # fmt: skip
        request, table = self._requests[slot], [*self._tables[slot][:same], *blocks]
        request.token_ids += tokens
        request.prompt_logprobs = None if scored < 0 else [None] * scored
        self._tables[slot] = table
        return Chunk(request, start, length, table, samples, idle, [self._requests[fork] for fork in forks])


class Anything:
    """In the place of a structure: rank 0's token counts, whatever is drawn here."""

    def mask(self) -> np.ndarray:
        return np.full(1, -1, dtype=np.int32)
