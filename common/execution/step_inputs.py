"""The tensors of a step, built fast: arrays that are reused, and one copy to the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.batch import RaggedBatch
from common.execution.upload import upload
from common.plan import Chunk, StepPlan
from common.request import Request


@dataclass(slots=True)
class HostBatch:
    """`RaggedBatch` while it is still on the host: 64-bit numbers, but for the block tables (32-bit).

    slots [B]: of the sequences' requests; draw_slots [S]: of those that draw a token. waiting [B]: the host does not
    know the last token of these."""

    input_ids: np.ndarray
    positions: np.ndarray
    query_start_loc: np.ndarray
    seq_lens: np.ndarray
    logit_indices: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    num_decodes: int
    slots: np.ndarray
    draw_slots: np.ndarray
    waiting: np.ndarray


class RequestSlots:
    """A number below `count` for each recent request: the place of all that is kept of it from step to step. `enter` is
    called for each request that gets one; when none is free, those of requests that are not in the step are."""

    def __init__(self, count: int) -> None:
        self.known: dict[Request, int] = {}
        self.enter: list[Callable[[int, Request], None]] = []
        self._free = list(range(count))[::-1]

    def of(self, requests: Sequence[Request]) -> np.ndarray:
        known = self.known
        try:
            return np.array([known[request] for request in requests])
        except KeyError:
            self._assign(requests)
            return self.of(requests)

    def _assign(self, requests: Sequence[Request]) -> None:
        here = set(requests)
        new = [request for request in here if request not in self.known]
        if len(new) > len(self._free):
            gone = [request for request in self.known if request not in here]
            self._free += [self.known.pop(request) for request in gone]
        for request in new:
            self.known[request] = slot = self._free.pop()
            for enter in self.enter:
                enter(slot, request)


class BlockTableArray:
    """Block tables by slot, as rows of one array; only rows that changed are rewritten."""

    def __init__(self, count: int) -> None:
        self._array = np.zeros((count, 0), dtype=np.int32)
        self._kept: list[Sequence[int]] = [()] * count

    def of(self, slots: np.ndarray, chunks: Sequence[Chunk]) -> np.ndarray:
        """[B, M], M as long as the longest table; numbers behind a table's end mean nothing."""
        kept, width = self._kept, 0
        for slot, chunk in zip(slots.tolist(), chunks, strict=True):
            table = chunk.block_table
            if kept[slot] != table:
                self._write(slot, table)
            if len(table) > width:
                width = len(table)
        return self._array[slots, :width]

    def _write(self, slot: int, table: Sequence[int]) -> None:
        rows, columns = self._array.shape
        if len(table) > columns:
            larger = np.zeros((rows, 2 * len(table)), dtype=np.int32)
            larger[:, :columns] = self._array
            self._array = larger
        self._array[slot, : len(table)] = table
        self._kept[slot] = table[:]


class StepBuilder:
    """Builds the batch of a plan as m3's `batch.py` defines it, with arrays that are kept from step to step.

    A slot is one token's place in the cache: slot = block * block_size + offset in the block.
    """

    def __init__(self, block_size: int, max_requests: int) -> None:
        self.block_size = block_size
        self.requests = RequestSlots(max_requests)
        self._tables = BlockTableArray(max_requests)
        self._numbers = np.arange(max_requests + 1)

    def __call__(self, plan: StepPlan, device: torch.device) -> RaggedBatch:
        host = self.host(plan)
        bounds = host.query_start_loc.astype(np.int32), host.seq_lens.astype(np.int32)
        places = host.logit_indices, host.slot_mapping, host.block_tables
        tensors = upload(device, host.input_ids, host.positions, *bounds, *places)
        longest, context = max(chunk.length for chunk in plan.chunks), int(host.seq_lens.max())
        return RaggedBatch(*tensors, max_query_len=longest, max_seq_len=context, num_decodes=host.num_decodes)

    def host(self, plan: StepPlan) -> HostBatch:
        chunks = plan.chunks
        forks = [fork for chunk in chunks if chunk.forks for fork in chunk.forks]
        slots = self.requests.of([*(chunk.request for chunk in chunks), *forks])[: len(chunks)]
        tables = self._tables.of(slots, chunks)
        starts = np.array([chunk.start for chunk in chunks])
        known = np.array([len(chunk.request.token_ids) for chunk in chunks])
        if not forks and all(chunk.samples and chunk.length == 1 for chunk in chunks):
            return self._decodes(chunks, slots, tables, starts, known)
        lengths = np.array([chunk.length for chunk in chunks])
        samples = np.array([1 + len(chunk.forks) if chunk.samples else 0 for chunk in chunks])
        seq_lens = starts + lengths
        query_start_loc = np.concatenate(([0], lengths.cumsum()))
        several = np.flatnonzero(lengths != 1)
        owner = np.arange(len(chunks)).repeat(lengths)  # [T]: the sequence of each token
        positions = np.arange(query_start_loc[-1]) - (query_start_loc[:-1] - starts)[owner]
        return HostBatch(
            input_ids=self._input_ids(chunks, query_start_loc, np.minimum(known - starts, lengths)),
            positions=positions,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            logit_indices=(query_start_loc[1:] - 1).repeat(samples),
            slot_mapping=self._slot_mapping(tables, owner, positions),
            block_tables=tables,
            num_decodes=int(several[0]) if several.size else len(chunks),
            slots=slots,
            draw_slots=self.requests.of(plan.drawing) if forks else slots[samples > 0],
            waiting=seq_lens > known,
        )

    def _decodes(
        self, chunks: Sequence[Chunk], slots: np.ndarray, tables: np.ndarray, starts: np.ndarray, known: np.ndarray
    ) -> HostBatch:
        """The same where each sequence has one token and draws the next: most steps, and for few sequences the host has
        no time to lose."""
        count = len(chunks)
        rows, seq_lens = self._numbers[:count], starts + 1
        waiting = seq_lens > known
        ids = [
            0 if waits else chunk.request.token_ids[chunk.start]
            for chunk, waits in zip(chunks, waiting.tolist(), strict=True)
        ]
        return HostBatch(
            input_ids=np.array(ids),
            positions=starts,
            query_start_loc=self._numbers[: count + 1],
            seq_lens=seq_lens,
            logit_indices=rows,
            slot_mapping=self._slot_mapping(tables, rows, starts),
            block_tables=tables,
            num_decodes=count,
            slots=slots,
            draw_slots=slots,
            waiting=waiting,
        )

    def _slot_mapping(self, tables: np.ndarray, owner: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[T]; owner [T]: the row of tables that each token's position counts in."""
        block, offset = np.divmod(positions, self.block_size)
        return tables[owner, block].astype(np.int64) * self.block_size + offset

    @staticmethod
    def _input_ids(chunks: Sequence[Chunk], query_start_loc: np.ndarray, known: np.ndarray) -> np.ndarray:
        """As `common.batch.token_ids`. known [B]: of each chunk's tokens, those that are."""
        ids = np.zeros(query_start_loc[-1], dtype=np.int64)
        for i in np.flatnonzero(known > 0).tolist():
            first = query_start_loc[i]
            ids[first : first + known[i]] = chunks[i].token_ids()
        return ids
