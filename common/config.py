"""What an engine is built from. One class for all stages, so that a comparison changes nothing but the stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError, refuse_unknown_options, require, require_number, unknown

CHOICES: dict[str, tuple[str | int, ...]] = {
    "scheduling_policy": ("fcfs", "priority"),
    "prefix_index": ("hash", "radix"),
    "head_bits": (8, 16),
}
DEFAULT_MODEL = "smollm2-135m-instruct"

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """`'bf16'`, `'bfloat16'` or `torch.bfloat16` to the torch dtype; anything else is a `UserError`."""
    if isinstance(name, torch.dtype):
        require(name in DTYPES.values(), f"dtype {name} is not supported. Choose from: {', '.join(DTYPES)}")
        return name
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def parse_device(name: str | torch.device) -> torch.device:
    """A device that exists here; `'auto'` is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}. Choose from: auto, cpu, cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r} is not supported. Choose from: auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {str(device)!r} is not here: PyTorch sees {torch.cuda.device_count()} GPUs. Use cpu.")
    return device


@refuse_unknown_options
@dataclass
class EngineConfig:
    """Options of an engine; unknown ones and impossible values raise `UserError`.

    model: a name, a local folder, a hub id, a GGUF file or `random:<preset>` (see `common.models.load_model`).
    dtype: of the weights, the activations and the KV cache.
    device: `auto`, `cpu`, `cuda`, `cuda:0`, ...
    max_model_len: most tokens of one request, prompt and output together; None takes the model's own limit.
    max_num_seqs: most requests that run at the same time.
    max_num_batched_tokens: most prompt tokens that one step prefills (from m2 on); from m5 on most tokens of a step.
    prefill_chunk_size: most prompt tokens of a step that also decodes, or `auto`; None: 256 on a CPU, 1,024 on a GPU
        (from m5 on).
    target_itl: seconds between two tokens of a request, which `auto` aims at (from m5 on).
    scheduling_policy: the order of waiting requests, see `WaitingQueue` (from m2 on).
    block_size: tokens in one block of the paged KV cache (from m3 on).
    swap_space: bytes of CPU memory for the blocks of preempted requests; 0: they are recomputed (from m3 on).
    kv_cache_memory: bytes for K and V of all layers together; None: on a GPU what `gpu_memory_utilization` leaves, on a
        CPU `KV_MEMORY_SHARE` of the free memory.
    gpu_memory_utilization: share of the GPU's memory that everything together may take, found by a trial step.
    attention_backend: how attention is computed: `auto`, `naive` (the definition), or a fast backend (from m4 on).
    fused_kernels: one kernel for what PyTorch does in several, from m4 on: Triton's on a GPU, Numba's on a CPU.
    cuda_graphs: replay steps from CUDA graphs; without effect on a CPU (from m4 on).
    overlap: plan and prepare the next step while this one runs; None: on a GPU yes, on a CPU no (from m2 on).
    prefix_index: how cached beginnings are found: `hash` or `radix` (from m6 on).
    head_bits: of the output head's weights: 8 on a GPU, and dequantised in float32; or 16, as loaded (from m7 on).
    seed: for requests that bring none of their own, and for random weights.
    """

    model: str = DEFAULT_MODEL
    dtype: str | torch.dtype = "float32"
    device: str | torch.device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    scheduling_policy: str = "fcfs"
    block_size: int = 16
    swap_space: int = 0
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    prefill_chunk_size: int | str | None = None
    target_itl: float = 0.05
    fused_kernels: bool = True
    cuda_graphs: bool = True
    overlap: bool | None = None
    prefix_index: str = "hash"
    head_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self.torch_dtype = parse_dtype(self.dtype)
        self.torch_device = parse_device(self.device)
        named = isinstance(self.model, str) and bool(self.model)
        require(named, f"model must be a name, a folder or a file, as text, for example {DEFAULT_MODEL!r}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory"):
            if getattr(self, name) is not None or name.startswith("max_num"):
                require_number(name, getattr(self, name), int, 1)
        require_number("block_size", self.block_size, int, 1, 256)
        require_number("swap_space", self.swap_space, int, 0)
        require_number("seed", self.seed, int, 0, 2**63 - 1)
        require_number("gpu_memory_utilization", self.gpu_memory_utilization, int | float, 0, 1, above=True)
        require_number("target_itl", self.target_itl, int | float, 0, above=True)
        for name in ("fused_kernels", "cuda_graphs", "overlap"):
            value = getattr(self, name)
            known = isinstance(value, bool) or (value is None and name == "overlap")
            require(known, f"{name} must be True or False, not {value!r}")
        if isinstance(self.prefill_chunk_size, str) and self.prefill_chunk_size.isdecimal():
            self.prefill_chunk_size = int(self.prefill_chunk_size)  # as a command line has it
        if self.prefill_chunk_size not in (None, "auto"):
            require_number("prefill_chunk_size, unless it is auto,", self.prefill_chunk_size, int, 1)
        require(
            isinstance(self.attention_backend, str), "attention_backend is a name"
        )  # which ones there are, m4 knows
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or not isinstance(value, type(choices[0])):
                raise unknown(name, value, choices)

    @property
    def captures(self) -> bool:
        """`cuda_graphs`, where there is a GPU to have them."""
        return self.cuda_graphs and self.torch_device.type == "cuda"

    @property
    def overlaps(self) -> bool:
        """`overlap`, decided: where there is no GPU, host and model would share the same cores."""
        return self.torch_device.type == "cuda" if self.overlap is None else self.overlap


ARRIVED_WITH = {
    "max_num_batched_tokens": 2,
    "scheduling_policy": 2,
    "overlap": 2,
    "block_size": 3,
    "swap_space": 3,
    "attention_backend": 4,
    "prefill_chunk_size": 5,
    "target_itl": 5,
    "fused_kernels": 4,
    "cuda_graphs": 4,
    "prefix_index": 6,
    "head_bits": 7,
}
"""Options that the first stages do not have, and the stage that brings each."""


def stage_options(stage: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of these options, those that the stage has: for a comparison that gives all stages the same."""
    return {name: value for name, value in wanted.items() if stage >= ARRIVED_WITH.get(name, 0)}


def refuse_later_options(stage: int, options: Iterable[str]) -> None:
    """An option that this stage would ignore is an error, not a silent difference."""
    for name in options:
        first = ARRIVED_WITH.get(name, 0)
        require(stage >= first, f"m{stage} has no option {name!r}: it arrives with m{first}")
