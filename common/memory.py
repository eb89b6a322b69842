"""How much memory the KV cache may take."""

import math
from collections.abc import Sequence

import torch

from common.config import EngineConfig
from common.errors import UserError, require
from common.models import Decoder
from common.models.config import ModelConfig
from common.request import Request
from common.sampler import sample
from common.sampling_params import SamplingParams
from common.watch.peak_memory import free_memory

KV_MEMORY_SHARE = 0.25  # of a CPU's free memory, where `kv_cache_memory` is not given


def kv_bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """2 (K and V) x layers x KV heads x head dimension x bytes of one number."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize


def allocate_kv(shape: Sequence[int], dtype: torch.dtype, device: torch.device, pinned: bool = False) -> torch.Tensor:
    """Zeros for K and V; `UserError` where there is no room. (Zeros, because whatever is masked must be finite.)"""
    try:
        return torch.zeros(tuple(shape), dtype=dtype, device=device, pin_memory=pinned)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises it plainly
        problem = f"no room for {math.prod(shape) * dtype.itemsize:,} bytes of KV cache on {device}"
        hint = "lower kv_cache_memory, swap_space, max_num_seqs or max_model_len"
        raise UserError(f"{problem}: {hint}") from error


def kv_budget(config: EngineConfig, model: Decoder) -> int:
    """Bytes for K and V of all layers together; of several ranks, this one's.

    Default: on a CPU a share of the free memory; on a GPU what `gpu_memory_utilization` leaves after what is in use and
    the largest step. What attention itself needs comes on top: little from m4 on, the score matrix before.
    """
    if config.kv_cache_memory is not None:
        return _share(config, config.kv_cache_memory)
    device = config.torch_device
    if device.type == "cpu":
        return _share(config, int(free_memory(device) * KV_MEMORY_SHARE))
    step = _bytes_of_largest_step(config, model)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = int(total * config.gpu_memory_utilization) - (total - free) - step
    share = f"gpu_memory_utilization={config.gpu_memory_utilization:g} of {total:,} bytes"
    taken = f"{total - free:,} are taken, and a step needs {step:,}"
    hint = "Raise it, or lower max_num_batched_tokens or max_num_seqs"
    require(budget > 0, f"{share} leaves nothing for the KV cache: {taken}. {hint}")
    return budget


def _share(config: EngineConfig, amount: int) -> int:
    """Of bytes for all ranks together, this one's."""
    return config.ranks.split.share(amount) if config.ranks else amount


@torch.inference_mode()
def _bytes_of_largest_step(config: EngineConfig, model: Decoder) -> int:
    """Measured: `max_num_batched_tokens` tokens through the model and `max_num_seqs` through the costliest sampling."""
    device, rows = model.device, config.max_num_seqs
    tokens = torch.zeros(max(config.max_num_batched_tokens, rows), dtype=torch.long, device=device)
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1, logprobs=1)
    requests = [Request("trial", [0], params, frozenset(), seed=0, arrival_time=0.0)] * rows
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        hidden = model(tokens, tokens, lambda layer, q, k, v: q.contiguous())
        sample(model.logits(hidden[:rows]), requests, [1] * rows)
    except torch.OutOfMemoryError as error:
        problem = f"out of memory on {device} in a trial step of {len(tokens)} tokens and {rows} requests"
        raise UserError(f"{problem}: lower max_num_batched_tokens or max_num_seqs") from error
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def blocks_in_budget(config: EngineConfig, model: Decoder, max_model_len: int) -> tuple[int, int]:
    """Blocks of the paged cache on the device, and on the CPU to swap into. Never more than `max_num_seqs` requests of
    `max_model_len` tokens could fill; `UserError` if there is not even one."""
    block_bytes = config.block_size * kv_bytes_per_token(model.config, model.dtype)
    budget, swap_space = kv_budget(config, model), _share(config, config.swap_space)
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    blocks = min(most, budget // block_bytes)
    require(blocks >= 1, f"kv_cache_memory ({budget:,} bytes) holds no block of {block_bytes:,} bytes: raise it")
    cpu_blocks = min(most, swap_space // block_bytes)
    too_little = f"swap_space ({config.swap_space:,} bytes) holds no block of {block_bytes:,} bytes: raise it, or 0"
    require(cpu_blocks > 0 or not config.swap_space, too_little)
    if config.ranks:
        blocks, cpu_blocks = config.ranks.least(blocks, cpu_blocks)
    return blocks, cpu_blocks


def rows_in_budget(config: EngineConfig, model: Decoder, bytes_per_row: int) -> int:
    """How many requests of `max_model_len` tokens fit, `max_num_seqs` at most; `UserError` if not even one."""
    budget = kv_budget(config, model)
    rows = min(config.max_num_seqs, budget // bytes_per_row)
    too_little = f"holds no request of max_model_len tokens ({bytes_per_row:,} bytes)"
    hint = "lower max_model_len or raise kv_cache_memory"
    require(rows >= 1, f"kv_cache_memory ({budget:,} bytes) {too_little}: {hint}")
    return rows if config.ranks is None else config.ranks.least(rows)[0]
