"""What an engine is built from. One class for all stages, so that a comparison changes nothing but the stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.errors import UserError
from common.options import refuse_unknown_options, require, unknown

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
    kv_cache_memory: bytes for K and V of all layers together; None takes `KV_MEMORY_SHARE` of the free memory.
    seed: for requests that bring none of their own, and for random weights.
    """

    model: str = DEFAULT_MODEL
    dtype: str | torch.dtype = "float32"
    device: str | torch.device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    kv_cache_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.torch_dtype = parse_dtype(self.dtype)
        self.torch_device = parse_device(self.device)
        require(bool(self.model), f"model is empty: give a name, a folder or a file, for example {DEFAULT_MODEL!r}")
        for name in ("max_model_len", "max_num_seqs", "kv_cache_memory"):
            value = getattr(self, name)
            if value is not None:
                require(
                    isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                    f"{name} must be a whole number of at least 1, not {value!r}",
                )
        require(isinstance(self.seed, int) and self.seed >= 0, f"seed must be a whole number >= 0, not {self.seed!r}")
