"""A step's plan on its way to the other ranks. Each request is described once, when it gets a slot; after that only the
new tokens and blocks follow, so a decode takes some twenty bytes."""

import pickle
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from common.execution.step_inputs import RequestSlots
from common.plan import Chunk, StepPlan
from common.request import Request
from common.sampling_params import SamplingParams

Entry = tuple[int, SamplingParams, int, int, list[int], bool]
"""A request that gets a slot: slot, options, seed, prompt tokens, all tokens, and has its output a structure?"""
Row = tuple[int, int, int, bool, bool, int, list[int], list[int], int, list[int]]  # as `PlanReader._chunk` takes it


class PlanWriter:
    """Rank 0's. count: most requests of a step."""

    def __init__(self, count: int) -> None:
        self._slots, self._entries = RequestSlots(count), list[Entry]()
        self._slots.enter.append(self._enter)
        self._tables: list[list[int]] = [[]] * count  # as the others know them
        self._known = [0] * count  # tokens

    def write(self, plan: StepPlan) -> bytes:
        slots = iter(self._slots.of([r for chunk in plan.chunks for r in (chunk.request, *chunk.forks)]).tolist())
        rows = [self._row(chunk, next(slots), [next(slots) for _ in chunk.forks]) for chunk in plan.chunks]
        entries, self._entries = self._entries, []
        return pickle.dumps((entries, rows, plan.swap_out, plan.swap_in, plan.copies), pickle.HIGHEST_PROTOCOL)

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
    """The other ranks'. vocab_size: the model's."""

    def __init__(self, vocab_size: int) -> None:
        self._anything: Any = Anything(vocab_size)
        self._requests: dict[int, Request] = {}
        self._tables: dict[int, list[int]] = {}

    def read(self, message: bytes) -> StepPlan:
        entries, rows, swap_out, swap_in, copies = pickle.loads(message)
        for slot, params, seed, num_prompt_tokens, tokens, structured in entries:
            request = Request(f"slot-{slot}", tokens[:num_prompt_tokens], params, frozenset(), seed, 0.0)
            request.token_ids = tokens
            if structured:
                request.structure, request.argmax_only = self._anything, False
            self._requests[slot], self._tables[slot] = request, []
        return StepPlan([self._chunk(*row) for row in rows], swap_out=swap_out, swap_in=swap_in, copies=copies)

    def _chunk(
        self, slot: int, start: int, length: int, samples: bool, idle: bool, same: int, blocks: Sequence[int],
        tokens: Sequence[int], scored: int, forks: Sequence[int],
    ) -> Chunk:  # fmt: skip
        """same: how many blocks are as before; blocks: those after them. tokens: the new ones. scored: how many of the
        prompt's log-probabilities are known, -1 if none are wanted. forks: their slots."""
        request, table = self._requests[slot], [*self._tables[slot][:same], *blocks]
        request.token_ids += tokens
        request.prompt_logprobs = None if scored < 0 else list(repeat(None, scored))
        self._tables[slot] = table
        return Chunk(request, start, length, table, samples, idle, [self._requests[fork] for fork in forks])


class Anything:
    """In the place of a structure: rank 0's token counts, whatever is drawn here."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = np.full(-(-vocab_size // 32), -1, dtype=np.int32)

    def mask(self) -> np.ndarray:
        return self._mask
