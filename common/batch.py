"""The tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.execution.upload import upload
from common.plan import Chunk, StepPlan


@dataclass(slots=True)
class RaggedBatch:
    """B sequences, T tokens, laid end to end. Integer tensors on the model's device.

    input_ids [T], positions [T]; query_start_loc [B + 1]: where each sequence's tokens begin; seq_lens [B]: its
    context after this step, cached tokens included; logit_indices [S]: the tokens whose logits are sampled, in the
    order of the plan's sampling chunks, once for each request that draws from them; slot_mapping [T] and block_tables
    [B, M]: where the KV cache stores and finds each token (None without a cache). `num_decodes`: so many of the first
    sequences have one token each. max_query_len and max_seq_len are on the host, so that no kernel waits for them.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    logit_indices: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decodes: int = 0
    slot_mapping: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(slots=True)
class HostBatch:
    """The same numbers while they are still on the host, 64-bit, but for the block tables. A token that a step in
    flight is about to sample is not known here: its place in `input_ids` holds 0."""

    input_ids: np.ndarray
    positions: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    logit_indices: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    max_query_len: int
    max_seq_len: int
    num_decodes: int


class BlockTables:
    """The block tables of the requests of late as rows of one array. Most tables do not change from step to step, and
    a row is written only when its table is not what it was."""

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), dtype=np.int32)
        self._rows: dict[str, int] = {}
        self._kept: list[Sequence[int]] = []
        self._free: list[int] = []

    def of(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """[B, M], M as long as the longest table; what stands behind a table's end means nothing."""
        known = self._rows
        rows = [known.get(chunk.request.id, -1) for chunk in chunks]
        if -1 in rows:
            rows = self._take_in(chunks)
        kept, width = self._kept, 0
        for row, chunk in zip(rows, chunks, strict=True):
            table = chunk.block_table
            if kept[row] != table:
                self._write(row, table)
            width = max(width, len(table))
        return self._array[rows, :width]

    def _take_in(self, chunks: Sequence[Chunk]) -> list[int]:
        """A row for everybody; whoever is not in this step loses his when the rows run out."""
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


class RaggedBuilder:
    """Builds the batch of a plan without any padding: T is the number of tokens to compute.

    A slot is one token's place in the cache: slot = block * block_size + offset in the block. A cache that gives each
    request one long row is the special case of a block as long as the row.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._tables = BlockTables()

    def __call__(self, plan: StepPlan, device: torch.device) -> RaggedBatch:
        host = self.host(plan)
        input_ids, positions, begins, ends, indices, slots, tables = upload(
            device,
            host.input_ids,
            host.positions,
            host.begins.astype(np.int32),
            host.ends.astype(np.int32),
            host.logit_indices,
            host.slots,
            host.tables,
        )
        return RaggedBatch(
            input_ids=input_ids,
            positions=positions,
            query_start_loc=begins,
            seq_lens=ends,
            logit_indices=indices,
            max_query_len=host.max_query_len,
            max_seq_len=host.max_seq_len,
            num_decodes=host.num_decodes,
            slot_mapping=slots,
            block_tables=tables,
        )

    def host(self, plan: StepPlan) -> HostBatch:
        chunks = plan.chunks
        lengths = np.array([chunk.length for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = starts + lengths
        begins = np.concatenate(([0], lengths.cumsum()))
        samples = np.array([1 + len(chunk.forks) if chunk.samples else 0 for chunk in chunks])
        several = np.flatnonzero(lengths != 1)
        owner = np.arange(len(chunks)).repeat(lengths)  # [T]: the sequence of each token
        positions = np.arange(begins[-1]) - (begins[:-1] - starts)[owner]
        tables = self._tables.of(chunks)
        slots = tables[owner, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        return HostBatch(
            input_ids=np.array(_token_ids(chunks), dtype=np.int64),
            positions=positions,
            begins=begins,
            ends=ends,
            logit_indices=(begins[1:] - 1).repeat(samples),
            slots=slots,
            tables=tables,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            num_decodes=int(several[0]) if several.size else len(chunks),
        )


def _token_ids(chunks: Sequence[Chunk]) -> list[int]:
    token_ids: list[int] = []
    for chunk in chunks:
        token_ids += chunk.token_ids()
        if chunk.waits_for_token:
            token_ids.append(0)
    return token_ids
