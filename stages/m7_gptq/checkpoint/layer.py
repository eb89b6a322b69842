"""One decoder layer of a checkpoint: its four quantised projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UserError
from common.models.quantized_weight import QuantizedWeight
from common.models.sources.nf4 import NF4Weight

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

AnyWeight = QuantizedWeight | NF4Weight
"""What a quantised layer may hold."""


@dataclass
class QuantizedLayer:
    """The four projections by their names in `DecoderLayer`, with the loss of each (none without calibration)."""

    weights: dict[str, AnyWeight]
    losses: dict[str, float]

    def check(self, index: int) -> None:
        """`UserError` where a scale is not finite; index: of the layer, for the message."""
        for name, weight in self.weights.items():
            if not bool(weight.scales.isfinite().all()):
                raise UserError(
                    f"layer {index}, {name}: weights that are not finite, or too large for a scale in float16"
                )


Finished = Callable[[int], QuantizedLayer | None]
"""What an earlier run left of a layer, if anything."""
