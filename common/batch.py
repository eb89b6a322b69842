"""The tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from common.plan import StepPlan


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


class RaggedBuilder:
    """Builds the batch of a plan without any padding: T is the number of tokens to compute.

    A slot is one token's place in the cache: slot = block * block_size + offset in the block. A cache that gives each
    request one long row is the special case of a block as long as the row.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, plan: StepPlan, device: torch.device) -> RaggedBatch:
        chunks = plan.chunks
        lengths = np.array([chunk.length for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = starts + lengths
        begins = np.concatenate(([0], lengths.cumsum()))
        owner = np.arange(len(chunks)).repeat(lengths)  # [T]: the sequence of each token
        positions = np.arange(begins[-1]) - (begins[:-1] - starts)[owner]
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = np.zeros((len(chunks), width), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.block_table)] = chunk.block_table
        slots = tables[owner, positions // self.block_size] * self.block_size + positions % self.block_size
        samples = np.array([1 + len(chunk.forks) if chunk.samples else 0 for chunk in chunks])
        input_ids = np.fromiter(chain.from_iterable(c.token_ids() for c in chunks), dtype=np.int64, count=begins[-1])
        several = np.flatnonzero(lengths != 1)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        return RaggedBatch(
            input_ids=tensor(input_ids),
            positions=tensor(positions),
            query_start_loc=tensor(begins.astype(np.int32)),
            seq_lens=tensor(ends.astype(np.int32)),
            logit_indices=tensor((begins[1:] - 1).repeat(samples)),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            num_decodes=int(several[0]) if several.size else len(chunks),
            slot_mapping=tensor(slots),
            block_tables=tensor(tables.astype(np.int32)),
        )
