"""m2's ragged batch, with a place in the paged cache for every token: slot mapping and block tables.

A slot is one token's place: slot = block * block_size + offset in the block.
"""

import numpy as np
import torch

from common.batch import RaggedBatch, token_ids
from common.execution.upload import upload
from common.plan import StepPlan


class PagedBatches:
    """Called with a plan, builds its batch: B sequences, T tokens, block tables as wide as the longest."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def __call__(self, plan: StepPlan, device: torch.device) -> RaggedBatch:
        chunks, size = plan.chunks, self._block_size
        lengths = [chunk.length for chunk in chunks]
        query_start_loc = np.cumsum([0, *lengths])
        width = max(len(chunk.block_table) for chunk in chunks)
        block_tables = np.array([[*c.block_table, *[0] * (width - len(c.block_table))] for c in chunks], dtype=np.int32)
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        owner = np.repeat(np.arange(len(chunks)), lengths)  # [T]: the sequence of each token
        slot_mapping = block_tables[owner, positions // size].astype(np.int64) * size + positions % size
        samples = [i for i, chunk in enumerate(chunks) if chunk.samples for _ in (chunk, *chunk.forks)]
        tensors = upload(
            device,
            np.array(token_ids(chunks)),
            positions,
            query_start_loc.astype(np.int32),
            np.array([chunk.end for chunk in chunks], dtype=np.int32),
            query_start_loc[1:][samples] - 1,
            slot_mapping,
            block_tables,
        )
        num_decodes = next((i for i, length in enumerate(lengths) if length > 1), len(lengths))
        longest = max(chunk.end for chunk in chunks)
        return RaggedBatch(*tensors, max_query_len=max(lengths), max_seq_len=longest, num_decodes=num_decodes)
