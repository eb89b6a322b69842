"""What a quantisation is made with; what cannot be done is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from common.errors import require
from common.models.quantized_weight import BITS, PER_CHANNEL
from common.models.sources.nf4 import BLOCK

Method = Literal["gptq", "rtn", "nf4"]

METHODS: tuple[Method, ...] = get_args(Method)

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)

UNUSED: dict[Method, tuple[str, ...]] = {
    "gptq": (),
    "rtn": ("desc_act", "damping"),
    "nf4": ("bits", "group_size", "symmetric", "desc_act", "search", "damping"),
}
"""The options that a method has no use for."""


@dataclass(frozen=True)
class Settings:
    """group_size: inputs that share a scale and a zero point, or -1 for all; None becomes 32, and 64 for `nf4`.

    symmetric: the zero point is the middle of the codes. desc_act: columns in the order of falling activation
    ("act-order"). search: look for the range of the grid with the least squared error, instead of min to max.
    damping: share of the Hessian's mean diagonal that is added to it. method: `gptq`, or a
    baseline: `rtn` (round to nearest) or `nf4`, which leaves no other choice.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    desc_act: bool = False
    search: bool = True
    damping: float = 0.01
    method: Method = "gptq"

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"method={self.method!r} is not known: choose from {', '.join(METHODS)}")
        usual_group = BLOCK if self.method == "nf4" else 32
        if self.group_size is None:
            object.__setattr__(self, "group_size", usual_group)
        require(self.bits in BITS, f"bits={self.bits} is not supported: choose from 4, 8")
        sizes = "32, 64, 128, or -1 for one group per output channel"
        require(self.group_size in GROUP_SIZES, f"group_size={self.group_size} is not supported: choose from {sizes}")
        require(0 < self.damping < 1, f"damping={self.damping} must lie between 0 and 1: 0.01 is usual")
        usual = {field.name: field.default for field in fields(self)} | {"group_size": usual_group}
        given = {word: getattr(self, word) for word in UNUSED[self.method]}
        other = ", ".join(f"{word}={value}" for word, value in given.items() if value != usual[word])
        require(not other, f"{self.method} has no use for some of these settings: leave out {other}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def group_of(self, in_features: int) -> int:
        """Inputs of one group of a matrix with so many inputs."""
        assert self.group_size is not None, "__post_init__ has set it"
        return in_features if self.group_size == PER_CHANNEL else self.group_size
