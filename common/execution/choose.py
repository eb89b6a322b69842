"""The one place that chooses fused kernels, and the only way to them."""

from __future__ import annotations

import importlib.util

import torch

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
