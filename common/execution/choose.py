"""Chooses an engine's operations and its unquantised linear layers: fused, compiled, or PyTorch's own."""

import importlib.util

import torch

from common.execution.cpu.bf16_linear import NumbaLinear, OneDnnLinear, UpcastLinear
from common.execution.cpu.panel_linear import PanelLinear
from common.execution.draws import Draw, draw
from common.models.linear import Linear, PackedLinear
from common.models.ops import Ops


def choose_ops(device: torch.device, fused: bool) -> Ops:
    """The fused kernels where they are wanted and can run: on a GPU of compute capability 8.0 (Ampere) or later with
    the package triton, on a CPU with the package numba. Otherwise plain PyTorch."""
    needs = {"cuda": "triton", "cpu": "numba"}.get(device.type)
    if not fused or needs is None or importlib.util.find_spec(needs) is None:
        return Ops()
    if device.type == "cpu":
        from common.execution.cpu.fused_cpu import CompiledOps

        return CompiledOps()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Ops()
    from common.execution.gpu.fused import FusedOps

    return FusedOps(device)


def choose_draw(ops: Ops) -> Draw:
    """How graphs draw tokens: by the operations' own kernels, where they have some."""
    return getattr(ops, "draw", draw)


def choose_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear | PackedLinear:
    """The fastest linear layer for this weight's device and dtype."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return Linear(weight, bias)
    if PanelLinear.takes(weight):
        return PanelLinear(weight, bias)
    if _onednn_multiplies_bfloat16():
        return OneDnnLinear(weight, bias)
    return NumbaLinear(weight, bias) if NumbaLinear.takes(weight) else UpcastLinear(weight, bias)


def _onednn_multiplies_bfloat16() -> bool:
    """Was PyTorch built with oneDNN, and does this processor take bfloat16?"""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
