"""What one rank holds of a model, and how it reads no more than that."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from common.errors import require
from common.models.config import ModelConfig
from common.models.weights import ModelSource, Part, Shape, tensor_shapes
from common.text.tokenizer import Tokenizer

GROUP, PANEL = 128, 32  # inputs of `down_proj`, and tokens, that stay together if possible: kernels take them whole


@dataclass(frozen=True)
class Split:
    """Rank `rank` of `size`. Heads, MLP and vocabulary are divided; norms and rotary tables are on every rank.

    Where there are fewer KV heads than ranks, several ranks hold the same one; where there are more, but no multiple
    of the ranks, the first ranks hold one more, with its query heads. Other numbers are refused.
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
        count, (_, most) = self.whole.num_kv_heads, self.kv_heads(0)
        uneven = f", which has {most} of {count} KV heads" if most * self.size > count > self.size else ""
        return f"over {self.size} ranks; bytes: of the first{uneven}"

    @property
    def rows(self) -> int:
        """Of embedding and head on each rank; the last may have fewer."""
        unit = PANEL if self.whole.vocab_size >= PANEL * self.size**2 else 1
        return -(-self.whole.vocab_size // (self.size * unit)) * unit

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """The first one, and the end."""
        count, size = self.whole.num_kv_heads, self.size
        if size > count:
            return rank * count // size, rank * count // size + 1
        return -(-rank * count // size), -(-(rank + 1) * count // size)

    @cached_property
    def held(self) -> dict[str, slice]:
        """By a tensor's kind: its rows that are this rank's, or, of o_proj and down_proj, its columns."""
        count, rank, size, kv = self.whole.intermediate_size, self.rank, self.size, self.kv_heads(self.rank)
        of = (rank, rank + 1) if size > self.whole.num_kv_heads else kv  # of these many shares of the query heads
        dim, share = self.whole.head_dim, self.whole.num_heads // max(size, self.whole.num_kv_heads)
        query, keys = slice(of[0] * share * dim, of[1] * share * dim), slice(kv[0] * dim, kv[1] * dim)
        unit = next(unit for unit in (GROUP, 64, 32, 16, 8, 1) if count % (unit * size) == 0 or unit == 1)
        inner = slice(*(at * (count // unit) // size * unit for at in (rank, rank + 1)))
        rows = slice(rank * self.rows, min((rank + 1) * self.rows, self.whole.vocab_size))
        held = {"q_proj": query, "k_proj": keys, "v_proj": keys, "o_proj": query, "embed_tokens": rows, "lm_head": rows}
        return held | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner)

    def part(self, name: str) -> Part:
        """Of the tensor of that name."""
        kind = name.split(".")[-2]
        columns = (slice(None),) if kind in ("o_proj", "down_proj") else ()
        return (*columns, self.held[kind]) if kind in self.held else ()

    @property
    def config(self) -> ModelConfig:
        """The rank's own part, as a model of its own."""
        sizes = {kind: held.stop - held.start for kind, held in self.held.items()}
        q, kv = (sizes[kind] // self.whole.head_dim for kind in ("q_proj", "k_proj"))
        mlp, rows = sizes["up_proj"], sizes["embed_tokens"]
        return replace(self.whole, num_heads=q, num_kv_heads=kv, intermediate_size=mlp, vocab_size=rows)

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

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        return self._source.read(name, self._shapes[name], self._split.part(name))

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()
