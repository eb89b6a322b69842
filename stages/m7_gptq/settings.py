"""What a quantisation is made with; what cannot be done is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from common.errors import require
from common.models.quantized_weight import BITS, PER_CHANNEL, WORD
from common.models.sources.nf4 import BLOCK

Method = Literal["gptq", "rtn", "nf4"]

METHODS: tuple[Method, ...] = get_args(Method)

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)

USUAL = -(1 << 31)
"""Stands for the method's own group size: 64 with NF4, otherwise 32. No number that anybody would give."""


@dataclass(frozen=True)
class Settings:
    """method: `gptq`, `rtn` (round to nearest), or `nf4` (QLoRA's 16 values), which leaves no other choice. group_size:
    inputs that share a scale and a zero point, or -1 for all; what is not given becomes 32, and 64 for `nf4`.

    symmetric: the zero point is the middle of the codes. desc_act: columns in the order of falling activation
    ("act-order"). search: look for the range of the grid with the least squared error, instead of min to max.
    damping: share of the Hessian's mean diagonal that is added to it.
    """

    bits: int = 4
    group_size: int = USUAL
    symmetric: bool = False
    desc_act: bool = False
    search: bool = True
    damping: float = 0.01
    method: Method = "gptq"

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"method={self.method!r} is not known: choose from {', '.join(METHODS)}")
        if self.group_size == USUAL:
            object.__setattr__(self, "group_size", BLOCK if self.method == "nf4" else 32)
        require(self.bits in BITS, f"bits={self.bits} is not supported: choose from 4, 8")
        sizes = "32, 64, 128, or -1 for one group per output channel"
        require(self.group_size in GROUP_SIZES, f"group_size={self.group_size} is not supported: choose from {sizes}")
        require(0 < self.damping < 1, f"damping={self.damping} must lie between 0 and 1: 0.01 is usual")
        no_order = self.method != "rtn" or (not self.desc_act and self.damping == Settings.damping)
        require(no_order, "rtn rounds each weight for itself: leave out desc_act and damping")
        if self.method == "nf4":
            usual = {f.name: f.default for f in fields(self)} | {"group_size": BLOCK, "method": "nf4"}
            other = [f"{word}={value}" for word, value in vars(self).items() if value != usual[word]]
            require(
                not other, f"nf4 is 4 bits in blocks of {BLOCK}, with nothing to choose: leave out {', '.join(other)}"
            )

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def name(self) -> str:
        """Short, for folders: `4bit-g64-sym-gptq`, and whatever is not usual."""
        if self.method == "nf4":
            return f"{self.bits}bit-g{self.group_size}-nf4"
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        parts = [f"{self.bits}bit", group, "sym" if self.symmetric else "asym", self.method]
        parts += ["desc_act"] * self.desc_act + ["nosearch"] * (not self.search)
        usual = self.damping == Settings.damping or self.method == "rtn"
        return "-".join(parts + ([] if usual else [f"damp{self.damping:g}"]))

    def group_of(self, in_features: int) -> int:
        """Inputs of one group of a matrix with so many inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """`UserError` where the checkpoint format has no place for a matrix of this shape."""
        if self.method == "nf4":
            fits = in_features % BLOCK == 0
            require(fits, f"{name} has {in_features} inputs: they must be a multiple of {BLOCK} to be stored in NF4")
            return
        count = WORD // self.bits
        require(
            in_features % count == 0 and out_features % count == 0,
            f"{name} is {out_features} x {in_features}: both must be multiples of {count} to be stored in "
            f"{self.bits} bits",
        )
