"""Execution, the second axis: a stage with several ways to run has two rows in the ladder, the idea alone (`plain`),
and with execution, as it runs by default. So no picture credits an idea with what execution gained."""

from typing import Any

import stages
from benchmarks.peers import PEERS
from common.config import stage_options
from common.errors import unknown

PLAIN = "plain"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"fused_kernels": False, "cuda_graphs": False, "overlap": False},
    "fused": {"fused_kernels": True, "cuda_graphs": False, "overlap": False},
    "graphs": {"fused_kernels": True, "cuda_graphs": True, "overlap": False},
    "overlap": {"fused_kernels": True, "cuda_graphs": True, "overlap": True},
}
"""The ablation, each way with all of the one before it. Compiled CPU operations count as fused kernels."""
CUDA_ONLY = ("cuda_graphs", "overlap")  # on by default only where there is a GPU


def options_of(way: str | None, stage: str) -> dict[str, Any]:
    """The engine options of a way, as far as the stage has them; none for the default (None). Peers have none."""
    if way is None:
        return {}
    if way not in WAYS:
        raise unknown("execution", way, WAYS)
    return stage_options(stages.number(stage), WAYS[way])


def execution_of(stage: str, device: str) -> list[str]:
    """The options by which the stage runs in another way than plain by default on this device."""
    options = {} if stage in PEERS else options_of(PLAIN, stage)
    return [name for name in options if device.startswith("cuda") or name not in CUDA_ONLY]
