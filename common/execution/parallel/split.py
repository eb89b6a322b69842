"""What one rank holds of a model, and how it reads no more than that."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from common.errors import require
from common.models.config import ModelConfig
from common.models.part import Part
from common.models.weights import EMBEDDING, HEAD, ModelSource, Shape, tensor_shapes
from common.text.tokenizer import Tokenizer

ALIGNED = 64  # rows of a vocabulary's parts, where it is large


@dataclass(frozen=True)
class Split:
    """Rank `rank` of `size`. Heads, MLP and vocabulary are divided; norms and rotary tables are on every rank.

    Where there are fewer KV heads than ranks, several ranks hold the same one. Where either number is no multiple of
    the other, some ranks hold a head more (`note` says so), or the split is refused.
    """

    whole: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        c, size = self.whole, self.size
        copies, each = size // c.num_kv_heads, c.num_heads // c.num_kv_heads
        shared = size <= c.num_kv_heads or (size % c.num_kv_heads == 0 and each % copies == 0)
        heads = f"{c.num_heads} attention heads and {c.num_kv_heads} KV heads"
        refused = f"{c.name}: {heads} cannot be divided over tensor_parallel_size={size} ranks"
        require(shared, f"{refused}: take one of {self._sizes()}")
        require(c.intermediate_size >= size and c.vocab_size >= size, f"{refused}: take fewer")

    def _sizes(self) -> str:
        kv, each = self.whole.num_kv_heads, self.whole.num_heads // self.whole.num_kv_heads
        return ", ".join(map(str, [*range(1, kv + 1), *(kv * n for n in range(2, each + 1) if each % n == 0)]))

    @property
    def note(self) -> str | None:
        """What a reader of figures must know."""
        uneven = self.size < self.whole.num_kv_heads and self.whole.num_kv_heads % self.size
        most = -(-self.whole.num_kv_heads // self.size)
        over = f"over {self.size} ranks"
        return f"{over}, one of which holds {most} of {self.whole.num_kv_heads} KV heads" if uneven else over

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """First and end."""
        count = self.whole.num_kv_heads
        if self.size > count:
            first = rank // (self.size // count)
            return first, first + 1
        return rank * count // self.size, (rank + 1) * count // self.size

    def heads(self, rank: int) -> tuple[int, int]:
        count, kv = self.whole.num_heads, self.whole.num_kv_heads
        if self.size > kv:
            return rank * count // self.size, (rank + 1) * count // self.size
        first, end = self.kv_heads(rank)
        return first * count // kv, end * count // kv

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding and the head on each rank; the last may have fewer."""
        rows, size = self.whole.vocab_size, self.size
        return -(-rows // size) if rows < 16 * ALIGNED * size else -(-rows // (size * ALIGNED)) * ALIGNED

    def inner(self, rank: int) -> tuple[int, int]:
        """Of the MLP's `intermediate_size`, in whole groups of quantisation where that comes out even."""
        count, size = self.whole.intermediate_size, self.size
        units = [unit for unit in (128, 64, 32, 16, 8, 4, 2, 1) if count % unit == 0 and count // unit >= size]
        unit = next((unit for unit in units if count // unit % size == 0), units[0])
        return tuple(n * (count // unit) // size * unit for n in (rank, rank + 1))  # pyright: ignore[reportReturnType]

    @cached_property
    def config(self) -> ModelConfig:
        """The rank's own part, as a model of its own."""
        (first, end), (kv_first, kv_end), (inner, inner_end) = (f(self.rank) for f in (self.heads, self.kv_heads, self.inner))
        begin = self.rank * self.vocabulary
        rows = min(begin + self.vocabulary, self.whole.vocab_size) - begin
        sizes = {"num_kv_heads": kv_end - kv_first, "intermediate_size": inner_end - inner, "vocab_size": rows}
        return replace(self.whole, num_heads=end - first, **sizes)

    def share(self, amount: int) -> int:
        """Of an amount for K and V on all ranks together, this rank's."""
        held = [end - first for first, end in map(self.kv_heads, range(self.size))]
        return amount * held[self.rank] // sum(held)

    def part(self, name: str) -> Part | None:
        """Which rows or columns of the tensor of that name are this rank's; None: all of it."""
        dim, kind = self.whole.head_dim, name.split(".")[-2]
        if name in (EMBEDDING, HEAD):
            first = self.rank * self.vocabulary
            return Part(0, first, first + self.config.vocab_size)
        if kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            first, end = (self.kv_heads if kind[0] in "kv" else self.heads)(self.rank)
            return Part(int(kind == "o_proj"), first * dim, end * dim)
        if kind in ("gate_proj", "up_proj", "down_proj"):
            return Part(int(kind == "down_proj"), *self.inner(self.rank))
        return None


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
