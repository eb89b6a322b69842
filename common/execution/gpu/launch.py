"""Launch options of a kernel that may start while the one in front of it still runs (see `triton_elementwise`)."""

from __future__ import annotations

from typing import Any

import torch

HOPPER = (9, 0)


def launch_options(device: torch.device, overlap: bool = True) -> dict[str, Any]:
    """EARLY tells the kernel to wait for the one in front, launch_pdl tells the GPU not to: both or neither."""
    early = overlap and device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
