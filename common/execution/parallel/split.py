"""What one rank holds of a model, and how it reads no more than that."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from common.errors import require
from common.models.config import ModelConfig
from common.models.weights import EMBEDDING, HEAD, ModelSource, Part, Shape, tensor_shapes
from common.text.tokenizer import Tokenizer

GROUP = 128  # inputs of `down_proj` that stay together where that is possible: whole groups of quantised weights


@dataclass(frozen=True)
class Split:
    """Rank `rank` of `size`. Heads, MLP and vocabulary are divided; norms and rotary tables are on every rank.

    Where there are fewer KV heads than ranks, several ranks hold the same one; where there are more, but no multiple
    of the ranks, some ranks hold one more, with its query heads. Other numbers are refused.
    """

    whole: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        c, size = self.whole, self.size
        shares = size % c.num_kv_heads == 0 and c.num_heads % size == 0
        heads = f"{c.num_heads} attention heads and {c.num_kv_heads} KV heads"
        refused = f"{c.name}: {heads} cannot be divided over tensor_parallel_size={size} ranks"
        require(size <= c.num_kv_heads or shares, f"{refused}: take {c.num_kv_heads} or fewer")
        require(c.intermediate_size >= size and self.rows * (size - 1) < c.vocab_size, f"{refused}: take fewer")

    @property
    def note(self) -> str:
        """What a reader of figures must know."""
        most = max(end - first for first, end in map(self.kv_heads, range(self.size)))
        uneven = (
            f", {most} of {self.whole.num_kv_heads} KV heads on one"
            if most * self.size != self.whole.num_kv_heads
            else ""
        )
        return f"over {self.size} ranks{uneven}; bytes: of the first"

    @property
    def rows(self) -> int:
        """Of embedding and head on each rank; the last may have fewer."""
        return -(-self.whole.vocab_size // self.size)

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """The first one, and the end."""
        count = self.whole.num_kv_heads
        first = rank * count // self.size
        return first, max(first + 1, (rank + 1) * count // self.size)

    def heads(self, rank: int) -> tuple[int, int]:
        count, kv = self.whole.num_heads, self.whole.num_kv_heads
        first, end = (rank, rank + 1) if self.size > kv else self.kv_heads(rank)
        return first * count // max(self.size, kv), end * count // max(self.size, kv)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """By a tensor's kind: its rows or columns that are this rank's."""
        dim, count, rank, size = self.whole.head_dim, self.whole.intermediate_size, self.rank, self.size
        query, keys = (Part(0, *(dim * at for at in find(rank))) for find in (self.heads, self.kv_heads))
        unit = next(unit for unit in (GROUP, 64, 32, 16, 8, 1) if count % (unit * size) == 0 or unit == 1)
        inner = Part(0, *(at * (count // unit) // size * unit for at in (rank, rank + 1)))
        rows = Part(0, rank * self.rows, min((rank + 1) * self.rows, self.whole.vocab_size))
        rows_of = {"q_proj": query, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
        rows_of |= dict.fromkeys((kind.split(".")[-2] for kind in (EMBEDDING, HEAD)), rows)
        return rows_of | {"o_proj": query._replace(dim=1), "down_proj": inner._replace(dim=1)}

    def part(self, name: str) -> Part | None:
        """Of the tensor of that name; None: all of it."""
        return self.parts.get(name.split(".")[-2])

    @property
    def config(self) -> ModelConfig:
        """The rank's own part, as a model of its own."""
        dim, sizes = self.whole.head_dim, {kind: part.end - part.first for kind, part in self.parts.items()}
        heads = {"num_heads": sizes["q_proj"] // dim, "num_kv_heads": sizes["k_proj"] // dim}
        return replace(self.whole, **heads, intermediate_size=sizes["up_proj"], vocab_size=sizes["embed_tokens"])

    def share(self, amount: int) -> int:
        """Of an amount for K and V on all ranks together, this rank's: as many tokens fit on each."""
        held = [end - first for first, end in map(self.kv_heads, range(self.size))]
        return amount * held[self.rank] // sum(held)


class SplitSource:
    """A `ModelSource` of one rank's part of another one."""

    def __init__(self, source: ModelSource, split: Split) -> None:
        self.config, self._source, self._split = split.config, source, split
        self._shapes = tensor_shapes(split.whole)
        self.note: str | None = getattr(source, "note", None)

    def read(self, name: str, shape: Shape, part: Part | None = None) -> torch.Tensor:
        return self._source.read(name, self._shapes[name], self._split.part(name))

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()
