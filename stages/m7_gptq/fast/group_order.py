"""Act-order for the fast layers, which want group g to be inputs g * size and on.

With act-order GPTQ deals the inputs to groups as it likes. `in_group_order` sorts a weight's inputs by group once, at
load, and `Permuted` does the same to x at each call; `Folded` saves that call for down_proj.
"""

from dataclasses import replace

import torch

from common.models.linear import Projection
from common.models.quantized_weight import QuantizedWeight, pack
from stages.m7_gptq.linear import ReadQuantized


class Permuted:
    """A layer whose inputs were sorted: gives it x sorted likewise."""

    def __init__(self, projection: Projection, order: torch.Tensor) -> None:
        self.projection, self.order = projection, order

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x.index_select(1, self.order))

    def weights_bytes(self) -> int:
        return self.projection.weights_bytes() + self.order.nbytes


class Folded:
    """A reader whose down_proj needs no `Permuted`: each of its inputs comes from the same output of gate_proj and
    up_proj, and sorting the outputs of those two costs nothing at run time. Not for float32, which keeps the order of
    its sums for comparisons with the dequantised model."""

    def __init__(self, read: ReadQuantized) -> None:
        self._read = read
        self._sorted: dict[str, QuantizedWeight] = {}  # down_proj whose inputs already come sorted

    def __call__(self, names: list[str], bias: bool) -> list[QuantizedWeight | None]:
        if names[0] in self._sorted:
            return [self._sorted.pop(names[0])]
        weights = self._read(names, bias)
        gate_and_up = [weight for weight in weights if weight is not None]
        if not names[0].endswith("mlp.gate_proj") or len(gate_and_up) < len(names) or gate_and_up[0].g_idx is None:
            return weights
        down_name = names[0].replace("gate_proj", "down_proj")
        (down,) = self._read([down_name], False)
        if down is None:
            return weights
        down, order = in_group_order(down)
        if order is None:
            return weights
        self._sorted[down_name] = down
        return [weight.outputs(order) for weight in gate_and_up]


def in_group_order(weight: QuantizedWeight) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """The weight with its inputs sorted by group and without g_idx, and the order [in] to sort x by; None: as it is.

    A weight whose groups, once sorted, are not all of `group_size` inputs is left alone, and keeps its g_idx.
    """
    if weight.g_idx is None:
        return weight, None
    group = weight.group_index()
    order = group.argsort(stable=True)
    plain = torch.arange(weight.in_features, device=group.device) // weight.group_size
    if not torch.equal(group[order], plain):
        return weight, None
    if torch.equal(group, plain):
        return replace(weight, g_idx=None), None
    return replace(weight, qweight=pack(weight.codes()[order], weight.bits), g_idx=None), order
