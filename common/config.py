"""What an engine is built from. One class for all stages, so that a comparison changes nothing but the stage."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch

from common.errors import UserError, refuse_unknown_options, require, require_number, unknown
from common.text.chat_template import template_kwargs

if TYPE_CHECKING:
    from common.execution.parallel.ranks import Ranks

CHOICES: dict[str, tuple[str | int, ...]] = {
    "scheduling_policy": ("fcfs", "priority"),
    "prefix_index": ("hash", "radix"),
    "head_bits": (8, 16),
    "linear_backend": ("auto", "naive"),
}
DEFAULT_MODEL = "smollm2-135m-instruct"

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


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
    """Options of an engine; unknown ones and impossible values raise `UserError`. The notes are the help texts of the
    command line, too."""

    model: Annotated[str, "A name, a Hugging Face folder or hub id, a *.gguf file, or random:<preset>."] = DEFAULT_MODEL
    dtype: Annotated[
        str | torch.dtype,
        "Of weights, activations and KV cache: bf16, fp16 or fp32; --dtype auto: bf16 where there is hardware for it.",
    ] = "float32"
    device: Annotated[str | torch.device, "auto (a GPU where there is one), cpu, cuda, cuda:0, ..."] = "auto"
    max_model_len: Annotated[int | None, "Most tokens of a request, output included. Without it: the model's."] = None
    max_num_seqs: Annotated[int, "Most requests that run at the same time."] = 16
    max_num_batched_tokens: Annotated[int, "Most prompt tokens of a step (from m2 on); from m5 on all tokens."] = 2048
    scheduling_policy: Annotated[str, "The order of waiting requests: fcfs or priority (from m2 on)."] = "fcfs"
    block_size: Annotated[int, "Tokens in one block of the paged KV cache (from m3 on)."] = 16
    swap_space: Annotated[int, "Bytes of CPU memory for preempted requests; 0: recompute them (from m3 on)."] = 0
    kv_cache_memory: Annotated[int | None, "Bytes for keys and values. Without it: a share of the free memory."] = None
    gpu_memory_utilization: Annotated[float, "Share of the GPU's memory for everything, found by a trial step."] = 0.9
    attention_backend: Annotated[str, "auto, naive (the definition), or a fast backend (from m4 on)."] = "auto"
    prefill_chunk_size: Annotated[
        int | str | None,
        "Most prompt tokens of a step with decodes, or auto. Without it: 256 on a CPU, 1,024 on a GPU (from m5 on).",
    ] = None
    target_itl: Annotated[float, "Seconds between two tokens of a request that auto aims at (from m5 on)."] = 0.05
    fused_kernels: Annotated[bool, "Around matrix products: Triton's on a GPU, Numba's on a CPU (from m4 on)."] = True
    cuda_graphs: Annotated[bool, "On a GPU, replay steps from CUDA graphs (from m4 on)."] = True
    tensor_parallel_size: Annotated[int, "Devices, or processes of a CPU, that share each layer (from m1 on)."] = 1
    overlap: Annotated[bool | None, "Plan the next step while this one runs. Without it: on a GPU (from m2 on)."] = None
    prefix_index: Annotated[str, "How prefixes are found: hash, or radix: also inside blocks (from m6 on)."] = "hash"
    head_bits: Annotated[int, "Bits of the output head: 8 (where a kernel takes it) or 16 (from m7 on)."] = 8
    linear_backend: Annotated[str, "Quantised layers: auto, or naive: dequantised at every call (from m7 on)."] = "auto"
    seed: Annotated[int, "For requests that bring none of their own, and for random weights; -1: any."] = 0
    chat_template: Annotated[str | None, "One of the model's, such as tool_use, or a file. Without it: default."] = None
    chat_template_kwargs: Annotated[
        str | Mapping[str, Any] | None, 'Variables of every chat, as JSON, such as {"enable_thinking": false}.'
    ] = None

    def __post_init__(self) -> None:
        self.chat_template_kwargs = template_kwargs(self.chat_template_kwargs)
        template = self.chat_template
        require(template is None or isinstance(template, str), "chat_template is a template's name, or a file, as text")
        self.torch_dtype = parse_dtype(self.dtype)
        self.torch_device = parse_device(self.device)
        self.ranks: Ranks | None = None  # that this process has joined: `stages.build` sets them, in a copy
        named = isinstance(self.model, str) and bool(self.model)
        require(named, f"model must be a name, a folder or a file, as text, for example {DEFAULT_MODEL!r}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory"):
            if getattr(self, name) is not None or name.startswith("max_num"):
                require_number(name, getattr(self, name), int, 1)
        require_number("block_size", self.block_size, int, 1, 256)
        require_number("tensor_parallel_size", self.tensor_parallel_size, int, 1, 1024)
        require_number("swap_space", self.swap_space, int, 0)
        if self.seed == -1:  # any, as other engines say it
            self.seed = secrets.randbits(63)
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
        require(isinstance(self.attention_backend, str), "attention_backend is a name")  # m4 knows which there are
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
    "tensor_parallel_size": 1,
    "max_num_batched_tokens": 2, "scheduling_policy": 2, "overlap": 2,
    "block_size": 3, "swap_space": 3,
    "attention_backend": 4, "fused_kernels": 4, "cuda_graphs": 4,
    "prefill_chunk_size": 5, "target_itl": 5,
    "prefix_index": 6,
    "head_bits": 7, "linear_backend": 7,
}  # fmt: skip
"""Options that the first stages do not have, and the stage that brings each."""


def stage_options(stage: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of these options, those that the stage has: for a comparison that gives all stages the same."""
    return {name: value for name, value in wanted.items() if stage >= ARRIVED_WITH.get(name, 0)}


def refuse_later_options(stage: int, options: Iterable[str]) -> None:
    """An option that this stage would ignore is an error, not a silent difference."""
    for name in options:
        first = ARRIVED_WITH.get(name, 0)
        require(stage >= first, f"m{stage} has no option {name!r}: it arrives with m{first}")
