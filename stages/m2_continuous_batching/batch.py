"""A ragged batch: the tokens of all sequences laid end to end, without padding. T counts the tokens to compute."""

import numpy as np
import torch

from common.batch import RaggedBatch, token_ids
from common.execution.upload import upload
from common.plan import StepPlan


def ragged_batch(plan: StepPlan, device: torch.device) -> RaggedBatch:
    """B sequences of any lengths; where each begins is a number in `query_start_loc`. A block table names the slot."""
    chunks = plan.chunks
    lengths = [chunk.length for chunk in chunks]
    query_start_loc = np.cumsum([0, *lengths])
    samples = [i for i, chunk in enumerate(chunks) if chunk.samples]
    *tensors, slots = upload(
        device,
        np.array(token_ids(chunks)),
        np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks]),  # positions
        query_start_loc,
        np.array([chunk.end for chunk in chunks]),  # seq_lens
        query_start_loc[1:][samples] - 1,  # logit_indices: the last token of each
        np.array([chunk.block_table for chunk in chunks]),
    )
    num_decodes = next((i for i, length in enumerate(lengths) if length > 1), len(lengths))
    longest = max(chunk.end for chunk in chunks)
    return RaggedBatch(
        *tensors, block_tables=slots, max_query_len=max(lengths), max_seq_len=longest, num_decodes=num_decodes
    )
