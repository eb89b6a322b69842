"""Where the parts of a divided model meet: two sums a layer, one of the embedding, and the choice of a token."""

from dataclasses import replace

import torch

from common.execution.parallel.ranks import Ranks
from common.models.decoder import Decoder
from common.models.linear import Projection
from common.models.ops import argmax

LOW = (1 << 32) - 1  # the lower half of a key


class RowLinear:
    """A projection of which each rank has some inputs (`o_proj`, `down_proj`): its result is the sum over ranks."""

    def __init__(self, own: Projection, ranks: Ranks) -> None:
        self.own, self._ranks = own, ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(self.own(x))

    def weights_bytes(self) -> int:
        return self.own.weights_bytes()


class SplitDecoder(Decoder):
    """One rank's part of a decoder. Its `config` has the part's heads, but the whole vocabulary."""

    splits_vocabulary = True

    def __init__(self, own: Decoder, ranks: Ranks) -> None:
        config = replace(own.config, vocab_size=ranks.split.whole.vocab_size)
        super().__init__(config, own.embedding, own.layers, own.norm, own.head)
        self._ranks, self._first = ranks, ranks.split.held["embed_tokens"].start
        self.note = "; ".join(note for note in (own.note, ranks.split.note) if note)
        for layer in self.layers:
            layer.o_proj, layer.down_proj = RowLinear(layer.o_proj, ranks), RowLinear(layer.down_proj, ranks)

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each token's row is on one rank; the others add zeros."""
        rows = input_ids - self._first
        inside = rows.clamp(0, len(self.embedding) - 1)
        x, cos, sin = super().embed(inside, positions)
        return self._ranks.sum(x.masked_fill_((rows != inside)[:, None], 0.0)), cos, sin

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the whole vocabulary, gathered: only for what needs them."""
        own = super().logits(hidden)
        own = torch.nn.functional.pad(own, (0, self._ranks.split.rows - own.shape[-1]))
        return torch.cat(self._ranks.gather(own), dim=-1)[:, : self.config.vocab_size]

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """By one reduction of (value, index) pairs, each as a 64-bit number: float32's bits as an integer of the same
        order, and below it the index, the lowest of which is the largest. [N, hidden] to [N]."""
        own = super().logits(hidden)
        index = argmax(own)
        value = own.gather(1, index[:, None])[:, 0].float() + 0.0  # -0.0 is no other number than 0.0
        bits = value.view(torch.int32)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        keys = self._ranks.gather((order << 32) | (LOW - self._first - index), "likeliest")
        return LOW - (torch.stack(keys).amax(0) & LOW)

    def agree(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rank 0 draws: it alone has what a structure allows."""
        return self._ranks.gather(token_ids, "first")[0]
