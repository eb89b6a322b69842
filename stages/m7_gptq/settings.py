"""What a quantisation is made with; what cannot be done is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from common.errors import require
from common.models.quantized_weight import BITS, PER_CHANNEL
from stages.m7_gptq.checkpoint.rules import check_baseline, folder_name, usual_group_size

Method = Literal["gptq", "rtn", "nf4"]

METHODS: tuple[Method, ...] = get_args(Method)

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)


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
        if self.group_size is None:
            object.__setattr__(self, "group_size", usual_group_size(self.method))
        require(self.bits in BITS, f"bits={self.bits} is not supported: choose from 4, 8")
        sizes = "32, 64, 128, or -1 for one group per output channel"
        require(self.group_size in GROUP_SIZES, f"group_size={self.group_size} is not supported: choose from {sizes}")
        require(0 < self.damping < 1, f"damping={self.damping} must lie between 0 and 1: 0.01 is usual")
        check_baseline(self)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def name(self) -> str:
        """Short, for folders: `4bit-g64-sym-gptq`, and whatever is not usual."""
        return folder_name(self)

    def group_of(self, in_features: int) -> int:
        """Inputs of one group of a matrix with so many inputs."""
        assert self.group_size is not None, "__post_init__ has set it"
        return in_features if self.group_size == PER_CHANNEL else self.group_size
