"""What a workload's decoding would reach if the GPU did nothing but read, at the rate of a copy measured now.

Every step reads all weights once, and for each token that it makes the K and V of all tokens before it. Prompts are
matrix products, at the rate of a large one. Reading alone can be a few per cent faster than a copy, which also writes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.attention import Ceilings, ceilings
from benchmarks.recipes import BenchRequest
from benchmarks.sheet import write_sheet
from benchmarks.workloads import find_size, preset_of
from common.config import parse_device, parse_dtype
from common.memory import kv_bytes_per_token
from common.models.config import ModelConfig
from common.models.load import open_source
from common.models.weights import tensor_shapes

SCHEMA = "limits-1"
EMBEDDING = "model.embed_tokens.weight"


def parameters(config: ModelConfig) -> tuple[int, int]:
    """What a step reads: the weights of its layers, and of the output head."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config).items()}
    head = sizes[EMBEDDING if config.tie_word_embeddings else "lm_head.weight"]
    return sum(sizes.values()) - head - (0 if config.tie_word_embeddings else sizes[EMBEDDING]), head


def tokens_per_s(requests: Sequence[BenchRequest], config: ModelConfig, dtype: torch.dtype, found: Ceilings) -> float:
    """Output tokens a second at these rates, all requests together from the beginning."""
    layers, head = parameters(config)
    steps = max(request.max_tokens for request in requests)
    read = steps * (layers + head) * dtype.itemsize
    contexts = sum(r.max_tokens * r.prompt_length + r.max_tokens * (r.max_tokens - 1) // 2 for r in requests)
    read += contexts * kv_bytes_per_token(config, dtype)
    operations = 2 * layers * sum(request.prompt_length for request in requests)
    return sum(request.max_tokens for request in requests) / (read / found.copy + operations / found.matmul)


def measure(path: Path, workloads: Sequence[str], model: str, dtype: str, device: str, quick: bool) -> dict[str, float]:
    """Measure the ceilings, write them and each workload's limit to `path`, return the limits."""
    target, kind = parse_device(device), parse_dtype(dtype)
    with torch.inference_mode():
        found = ceilings(target, kind, quick)
    shape = open_source(model, target).config
    preset = preset_of(target.type, quick)
    limits = {
        name: tokens_per_s(find_size(name, None, preset).requests(shape.vocab_size), shape, kind, found)
        for name in workloads
    }
    config = {"model": model, "dtype": dtype, "device": str(target), "preset": preset}
    top = {"copy_gb_per_s": found.copy / 1e9, "matmul_tflop_per_s": found.matmul / 1e12}
    records = [{"workload": name, "output_tokens_per_s": limit} for name, limit in limits.items()]
    write_sheet(path, SCHEMA, config, records, ceilings=top)
    return limits
