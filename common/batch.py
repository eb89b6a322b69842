"""The tensors of one step. Each stage that changes *what a batch is* has a `batch.py` that builds them from a plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from common.plan import Chunk

NO_CACHE = torch.empty(0, dtype=torch.long)


@dataclass(slots=True)
class RaggedBatch:
    """B sequences, T tokens, laid end to end. Integer tensors on the model's device.

    input_ids [T], positions [T]; query_start_loc [B + 1]: where each sequence's tokens begin; seq_lens [B]: its
    context after this step, cached tokens included; logit_indices [S]: the tokens whose logits are sampled, in the
    order of the plan's sampling chunks, once for each request that draws from them; slot_mapping [T] and block_tables
    [B, M]: where the KV cache stores and finds each token (empty without a cache). `num_decodes`: that many of the
    first sequences have one token each. The numbers are on the host, so that no kernel waits for them.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    logit_indices: torch.Tensor
    slot_mapping: torch.Tensor = NO_CACHE
    block_tables: torch.Tensor = NO_CACHE
    max_query_len: int = field(kw_only=True)
    max_seq_len: int = field(kw_only=True)
    num_decodes: int = 0

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def sequences(self, first: int = 0) -> list[tuple[int, int, int]]:
        """(first token, end of tokens, context length) of each sequence from `first` on; waits for the device."""
        starts, lengths = self.query_start_loc[first:].tolist(), self.seq_lens[first:].tolist()
        return list(zip(starts[:-1], starts[1:], lengths, strict=True))


def token_ids(chunks: Sequence[Chunk]) -> list[int]:
    """The input tokens of chunks, end to end. A token that a step in flight is about to sample is not known here: its
    place holds 0, and the runner fills it in on the device."""
    ids: list[int] = []
    for chunk in chunks:
        ids += chunk.token_ids()
        if chunk.waits_for_token:
            ids.append(0)
    return ids
