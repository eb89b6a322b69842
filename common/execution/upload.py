"""From the host to the device without waiting: everything in one piece of pinned memory, moved by one copy."""

import numpy as np
import torch

ALIGNMENT = 128  # bytes: a line of the GPU's cache, and enough for every kernel


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """These arrays as tensors on the device. On a GPU the copy is queued, on a CPU none is made."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([aligned(array.nbytes) for array in arrays]).tolist()
    begins = [0, *ends[:-1]]
    pinned = torch.empty(max(ends[-1], ALIGNMENT), dtype=torch.uint8, pin_memory=True)  # reused when its copy is done
    room = pinned.numpy()
    for array, begin in zip(arrays, begins, strict=True):
        room[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = pinned.to(device, non_blocking=True)
    return [
        moved[begin : begin + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, begin in zip(arrays, begins, strict=True)
    ]
