"""The plan's way to all ranks: rank 0's runner tells it and runs it, the others run what they hear.

Each request is sent once, when it gets a slot; after that only its new tokens and blocks follow, so a decode takes some
twenty bytes.
"""

import pickle
import time
from copy import copy
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import numpy as np

from common.execution.parallel.ranks import OVER, PATIENCE, Ranks
from common.execution.step_inputs import RequestSlots
from common.plan import Chunk, StepPlan
from common.request import Request, SampledToken
from common.runner import Runner

Row = tuple[int, list[int], int, list[int], list[int], int, int, int, bool, bool]  # as `PlanReader._chunk` takes it


class PlanWriter:
    """Rank 0's. count: most requests of a step."""

    def __init__(self, count: int, vocab_size: int) -> None:
        self._slots, self._vocab_size, self._new = RequestSlots(count), vocab_size, dict[int, Request]()
        self._slots.enter.append(self._enter)
        self._tables, self._known = [list[int]()] * count, [0] * count  # blocks and tokens that the others know

    def write(self, plan: StepPlan) -> bytes:
        self._slots.of([request for chunk in plan.chunks for request in (chunk.request, *chunk.forks)])
        rows = [self._row(chunk) for chunk in plan.chunks]
        new, self._new = self._new, {}
        return pickle.dumps((new, rows, plan.swap_out, plan.swap_in, plan.copies), pickle.HIGHEST_PROTOCOL)

    def _enter(self, slot: int, request: Request) -> None:
        bare: Any = copy(request)
        bare.siblings, bare.detokenizer = [], None
        if request.structure is not None:  # allows all tokens there: what rank 0 draws counts
            bare.structure = SimpleNamespace(mask=partial(np.full, -(-self._vocab_size // 32), -1, np.int32))
        self._new[slot], self._tables[slot], self._known[slot] = bare, [], len(request.token_ids)

    def _row(self, chunk: Chunk) -> Row:
        request, slot, table = chunk.request, self._slots.known[chunk.request], list(chunk.block_table)
        before, self._tables[slot] = self._tables[slot], table
        same = len(before) if table[: len(before)] == before else 0
        tokens, self._known[slot] = request.token_ids[self._known[slot] :], len(request.token_ids)
        forks = [self._slots.known[fork] for fork in chunk.forks]
        scored, what = len(request.prompt_logprobs or ()), (chunk.start, chunk.length, chunk.samples, chunk.idle)
        return slot, tokens, same, table[same:], forks, scored, *what


class PlanReader:
    """The other ranks'."""

    def __init__(self) -> None:
        self._requests, self._tables = dict[int, Request](), dict[int, list[int]]()

    def read(self, message: bytes) -> StepPlan:
        new, rows, *moves = pickle.loads(message)
        self._requests |= new
        self._tables |= {slot: [] for slot in new}
        return StepPlan([self._chunk(*row) for row in rows], 0, [], [], *moves)

    def _chunk(
        self, slot: int, tokens: list[int], same: int, blocks: list[int], forks: list[int], scored: int,
        start: int, length: int, samples: bool, idle: bool,
    ) -> Chunk:  # fmt: skip
        """tokens: the new ones. same: how many blocks are as before; blocks: those after them. forks: their slots.
        scored: how many of the prompt's log-probabilities are known."""
        request, table = self._requests[slot], [*self._tables[slot][:same], *blocks]
        self._tables[slot] = table
        request.token_ids += tokens
        request.num_tokens = start + length + samples
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = list(repeat(None, scored))
        return Chunk(request, start, length, table, samples, idle, [self._requests[fork] for fork in forks])


class RankRunner(Runner):
    """A stage's runner on one of several ranks. It goes on with what the stage has `made`."""

    def __init__(self, made: Runner, ranks: Ranks, max_num_seqs: int) -> None:
        vars(self).update(vars(made))
        self.ranks, self._writer = ranks, PlanWriter(max_num_seqs, made.model.config.vocab_size)

    def submit(self, plan: StepPlan) -> None:
        with self.ranks.together():
            self.ranks.tell(self._writer.write(plan))
            super().submit(plan)

    def collect(self) -> dict[str, SampledToken]:
        with self.ranks.together():
            marks, begin = self._launched[0].lap.marks, time.monotonic()
            while marks is not None and not marks[1].query():  # NCCL waits for a rank that has ended, for ever
                time.sleep(0)
                late = time.monotonic() - begin > PATIENCE.seconds
                if late or self.ranks.lost is not None:
                    raise RuntimeError("timed out" if late else "")
            return super().collect()

    def follow(self) -> None:
        """Not on rank 0: run what it tells, until it is over. As there, at most two steps are in flight."""
        reader = PlanReader()
        while (message := self.ranks.hear()) != OVER:
            super().submit(reader.read(message))
            if len(self._launched) > 1:
                super().collect()
