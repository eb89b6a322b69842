"""Launch options of a kernel that may start while the one in front of it still runs (see `triton_elementwise`)."""

from typing import Any

import torch

HOPPER = (9, 0)


def launch_options(device: torch.device, pdl: bool = True) -> dict[str, Any]:
    """Programmatic dependent launch: the GPU starts this kernel before the previous one ends (launch_pdl), and the
    kernel waits (PDL: gdc_wait) before it reads what that one writes. Set both or neither."""
    pdl = pdl and device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
