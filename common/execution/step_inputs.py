"""The tensors of a step, built fast: arrays that are reused, and one copy to the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.batch import RaggedBatch, token_ids
from common.execution.upload import upload
from common.plan import Chunk, StepPlan


@dataclass(slots=True)
class HostBatch:
    """`RaggedBatch` while it is still on the host: 64-bit numbers, but for the block tables (32-bit)."""

    input_ids: np.ndarray
    positions: np.ndarray
    query_start_loc: np.ndarray
    seq_lens: np.ndarray
    logit_indices: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    max_query_len: int
    max_seq_len: int
    num_decodes: int


class BlockTableArray:
    """Recent requests' block tables as rows of one array; only rows that changed are rewritten."""

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), dtype=np.int32)
        self._rows: dict[str, int] = {}
        self._kept: list[Sequence[int]] = []
        self._free: list[int] = []

    def of(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """[B, M], M as long as the longest table; numbers behind a table's end mean nothing."""
        known = self._rows
        rows = [known.get(chunk.request.id, -1) for chunk in chunks]
        if -1 in rows:
            rows = self._assign_rows(chunks)
        kept, width = self._kept, 0
        for row, chunk in zip(rows, chunks, strict=True):
            table = chunk.block_table
            if kept[row] != table:
                self._write(row, table)
            width = max(width, len(table))
        return self._array[rows, :width]

    def _assign_rows(self, chunks: Sequence[Chunk]) -> list[int]:
        """Give each request of the step a row; when rows run out, take those of absent requests."""
        here = {chunk.request.id for chunk in chunks}
        new = [id for id in here if id not in self._rows]
        if len(new) > len(self._free):
            gone = [id for id in self._rows if id not in here]
            self._free += [self._rows.pop(id) for id in gone]
        more = len(new) - len(self._free)
        if more > 0:
            self._free += range(len(self._kept), len(self._kept) + more)
            self._kept += [()] * more
            self._resize(len(self._kept), self._array.shape[1])
        for id in new:
            self._rows[id] = self._free.pop()
        return [self._rows[chunk.request.id] for chunk in chunks]

    def _write(self, row: int, table: Sequence[int]) -> None:
        if len(table) > self._array.shape[1]:
            self._resize(self._array.shape[0], 2 * len(table))
        self._array[row, : len(table)] = table
        self._kept[row] = table[:]

    def _resize(self, rows: int, columns: int) -> None:
        larger = np.zeros((rows, columns), dtype=np.int32)
        larger[: self._array.shape[0], : self._array.shape[1]] = self._array
        self._array = larger


class StepBuilder:
    """Builds the batch of a plan as m3's `batch.py` defines it, with arrays that are kept from step to step.

    A slot is one token's place in the cache: slot = block * block_size + offset in the block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._tables = BlockTableArray()

    def __call__(self, plan: StepPlan, device: torch.device) -> RaggedBatch:
        host = self.host(plan)
        bounds = host.query_start_loc.astype(np.int32), host.seq_lens.astype(np.int32)
        places = host.logit_indices, host.slot_mapping, host.block_tables
        tensors = upload(device, host.input_ids, host.positions, *bounds, *places)
        longest, context, decodes = host.max_query_len, host.max_seq_len, host.num_decodes
        return RaggedBatch(*tensors, max_query_len=longest, max_seq_len=context, num_decodes=decodes)

    def host(self, plan: StepPlan) -> HostBatch:
        chunks = plan.chunks
        lengths = np.array([chunk.length for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        seq_lens = starts + lengths
        query_start_loc = np.concatenate(([0], lengths.cumsum()))
        samples = np.array([1 + len(chunk.forks) if chunk.samples else 0 for chunk in chunks])
        several = np.flatnonzero(lengths != 1)
        owner = np.arange(len(chunks)).repeat(lengths)  # [T]: the sequence of each token
        positions = np.arange(query_start_loc[-1]) - (query_start_loc[:-1] - starts)[owner]
        tables = self._tables.of(chunks)
        slots = tables[owner, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        return HostBatch(
            input_ids=np.array(token_ids(chunks), dtype=np.int64),
            positions=positions,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            logit_indices=(query_start_loc[1:] - 1).repeat(samples),
            slot_mapping=slots,
            block_tables=tables,
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            num_decodes=int(several[0]) if several.size else len(chunks),
        )
