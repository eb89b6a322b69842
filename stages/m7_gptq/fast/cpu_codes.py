"""The layers of 4 bits and the head of 8 on a CPU, multiplied in bytes: activations are rounded too (W4A8, W8A8)."""

import importlib.util

import numpy as np
import torch

from common.execution.cpu.arrays import bits
from common.execution.cpu.huge_pages import huge_pages
from common.execution.cpu.panel_linear import PANEL, PanelProduct
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.head import HeadWeight

GROUP = 32  # inputs of an activation's scale (`simd_codes.GROUP`)
FOUR_BITS, EIGHT_BITS = (0,) * 4, (0,) * 8  # the kernels are compiled for the length
NO_OFFSETS = np.empty(0, np.uint8)


class CodesLinear(PanelProduct):
    """Panels of codes; the two kinds below say what a code stands for."""

    def __init__(
        self, codes: torch.Tensor, bias: torch.Tensor | None, offsets: np.ndarray, scales: torch.Tensor, per: int
    ) -> None:
        """codes: uint8 [out, in]. offsets: of 4 bits, else none; scales: [groups, out]; per: groups of x in one."""
        from stages.m7_gptq.fast.kernels import cpu_codes

        outputs, size = codes.shape
        fours = codes.view(outputs // PANEL, 2, PANEL // 2, size // GROUP, GROUP // 4, 4).permute(0, 3, 1, 4, 2, 5)
        if offsets.size:
            fours = fours[:, :, :, 0::2] | fours[:, :, :, 1::2] << 4
        packed, factors = huge_pages.copy(fours).flatten().numpy(), bits(in_panels(scales).flatten())
        bias = None if bias is None else bias.to(torch.bfloat16)
        bit_width = FOUR_BITS if offsets.size else EIGHT_BITS
        super().__init__(cpu_codes.linear, outputs, size, bias, packed, offsets, factors, per, bit_width)
        self._bytes = sum(array.nbytes for array in (packed, offsets, factors, bias) if array is not None)

    def weights_bytes(self) -> int:
        return self._bytes


class CpuInt4Linear(CodesLinear):
    """`x @ weight.T + bias` for a 4-bit weight whose groups lie in order."""

    def __init__(self, weight: QuantizedWeight) -> None:
        per = weight.group_size // GROUP if weight.groups > 1 else weight.in_features // GROUP
        scales = weight.scales if weight.scales.dtype == torch.float16 else weight.scales.float()
        super().__init__(weight.codes().T, weight.bias, in_panels(16 - weight.zeros).flatten().numpy(), scales, per)


class CpuInt8Head(CodesLinear):
    """`x @ weight.T` for an output head in 8 bits."""

    def __init__(self, head: HeadWeight) -> None:
        codes = (head.codes.short() + 128).byte()
        super().__init__(codes, None, NO_OFFSETS, head.scales[None], codes.shape[1] // GROUP)


def in_panels(numbers: torch.Tensor) -> torch.Tensor:
    """[groups, out] to [out / PANEL, groups, PANEL], in huge pages."""
    return huge_pages.copy(numbers.view(len(numbers), -1, PANEL).transpose(0, 1))


def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Is the weight, whose groups lie in order, one for these layers, and has this CPU products of bytes?"""
    grouped = weight.groups == 1 or weight.group_size % GROUP == 0
    whole = weight.out_features % PANEL == 0 and weight.in_features % GROUP == 0
    if weight.bits != 4 or not grouped or not whole or dtype != torch.bfloat16 or not _has_numba():
        return False
    from stages.m7_gptq.fast.kernels import simd_codes

    return simd_codes.multiplies_bytes() and int(weight.zeros.max()) <= simd_codes.CENTRE[4]


def takes_head(weight: torch.Tensor) -> bool:
    """Is the weight [vocab, hidden] one for `CpuInt8Head`? Without VNNI, 8 bits times 8 bits overflow."""
    whole = weight.shape[0] % PANEL == 0 and weight.shape[1] % GROUP == 0
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not whole or not _has_numba():
        return False
    from stages.m7_gptq.fast.kernels import simd_codes

    return simd_codes.multiplies_whole_bytes()


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
