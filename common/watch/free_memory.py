"""How much memory is free, and whether that is enough."""

import os
from pathlib import Path

import torch

from common.errors import require


def free_memory(device: torch.device) -> int:
    """Bytes, within a container's limit; on a CPU without /proc/meminfo, half of what is installed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _container_free())


def _container_free(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a control group (version 2) leaves; a huge number where there is no limit."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**62
    return max(0, int(limit.read_text()) - int(used.read_text()))


def require_memory(what: str, needed: int, device: torch.device, hint: str = "take a smaller model or dtype") -> None:
    """`UserError` where that many bytes are not free, before anything is made of them."""
    free = free_memory(device)
    require(needed <= free, f"{what} would take {needed:,} bytes, and {free:,} are free on {device}: {hint}")
