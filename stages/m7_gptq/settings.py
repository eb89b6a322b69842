"""What a quantisation is made with; what cannot be done is refused here, before anything runs."""

from dataclasses import dataclass
from typing import ClassVar

from common.errors import require
from common.models.quantized_weight import BITS, PER_CHANNEL

GROUP_SIZES = (32, 64, 128, PER_CHANNEL)


@dataclass(frozen=True)
class Settings:
    """group_size: inputs that share a scale and a zero point, or -1 for all.

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
    method: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        require(self.bits in BITS, f"bits={self.bits} is not supported: choose from 4, 8")
        sizes = "32, 64, 128, or -1 for one group per output channel"
        require(self.group_size in GROUP_SIZES, f"group_size={self.group_size} is not supported: choose from {sizes}")
        require(0 < self.damping < 1, f"damping={self.damping} must lie between 0 and 1: 0.01 is usual")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def group_of(self, in_features: int) -> int:
        """Inputs of one group of a matrix with so many inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size
