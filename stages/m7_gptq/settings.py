"""What a quantisation is made with; what cannot be done is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.models.packed import BITS, PER_CHANNEL, WORD
from common.options import require

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)


@dataclass(frozen=True)
class Settings:
    """method: `gptq`, or `rtn` (round to nearest). group_size: inputs that share a scale and a zero point, or -1.

    symmetric: the zero point is the middle of the codes. desc_act: columns in the order of falling activation
    ("act-order"). search: look for the range of the grid with the least squared error, instead of min to max.
    damping: share of the Hessian's mean diagonal that is added to it.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    desc_act: bool = False
    search: bool = True
    damping: float = 0.01
    method: Literal["gptq", "rtn"] = "gptq"

    def __post_init__(self) -> None:
        require(self.bits in BITS, f"bits={self.bits} is not supported: choose from 4, 8")
        sizes = "32, 64, 128, or -1 for one group per output channel"
        require(self.group_size in GROUP_SIZES, f"group_size={self.group_size} is not supported: choose from {sizes}")
        require(self.method in ("gptq", "rtn"), f"method={self.method!r} is not known: choose from gptq, rtn")
        require(0 < self.damping < 1, f"damping={self.damping} must lie between 0 and 1: 0.01 is usual")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def name(self) -> str:
        """Short, for folders: `4bit-g64-sym-gptq`, and whatever is not usual."""
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
        count = WORD // self.bits
        require(
            in_features % count == 0 and out_features % count == 0,
            f"{name} is {out_features} x {in_features}: both must be multiples of {count} to be stored in "
            f"{self.bits} bits",
        )
