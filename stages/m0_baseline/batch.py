"""A padded batch: every row as long as the longest."""

import torch

from common.batch import RaggedBatch
from common.plan import StepPlan

PAD = 0  # any token will do: padding comes after a row's real tokens, which causal attention never lets look ahead


def pad_batch(plan: StepPlan, device: torch.device) -> RaggedBatch:
    """The tokens of a step as B rows of one length L, laid end to end (T = B * L)."""
    chunks = plan.chunks
    longest = max(chunk.length for chunk in chunks)
    tokens = [chunk.token_ids() + [PAD] * (longest - chunk.length) for chunk in chunks]
    starts = torch.tensor([chunk.start for chunk in chunks])
    last = [row * longest + chunk.length - 1 for row, chunk in enumerate(chunks) if chunk.samples]
    return RaggedBatch(
        input_ids=torch.tensor(tokens).flatten().to(device),
        positions=(starts[:, None] + torch.arange(longest)).flatten().to(device),
        query_start_loc=(torch.arange(len(chunks) + 1) * longest).to(device),
        seq_lens=torch.tensor([chunk.end for chunk in chunks]).to(device),
        logit_indices=torch.tensor(last, dtype=torch.long).to(device),
        max_query_len=longest,
        max_seq_len=max(chunk.start for chunk in chunks) + longest,
    )
