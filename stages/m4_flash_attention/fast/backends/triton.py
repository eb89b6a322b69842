"""Our own Triton kernels: decodes by Flash-Decoding, chunks by FlashAttention-2, both over the blocks in place."""

import importlib.util
import os

import torch

from common.execution.gpu.launch import launch_options
from common.models.ops import Heads
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend

AUTO = {"cuda": 0}
WHY = "reads the blocks in place; of those measured on a GPU the fastest at decode"
CAPTURABLE = True

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(shape: AttentionShape) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; it exists for Linux)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if shape.device.type != "cuda" and not interpreted:
        return f"it needs a GPU, and the device is {shape.device} (TRITON_INTERPRET=1 runs it there, very slowly)"
    if interpreted and shape.dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) does not compute in bfloat16"
    if shape.device.type == "cuda" and torch.cuda.get_device_capability(shape.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if shape.dtype not in DTYPES:
        return f"it knows float32, bfloat16 and float16, not {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim not in HEAD_DIMS:
        return f"it knows head dimensions {', '.join(map(str, HEAD_DIMS))}, not {shape.head_dim}"
    return None


class TritonBackend(Backend):
    """A step is safe to capture in a CUDA graph: nothing is read on the host, and what is written lies where it lay."""

    def __init__(self, shape: AttentionShape) -> None:
        from stages.m4_flash_attention.fast.kernels.triton_decode import DecodeKernel
        from stages.m4_flash_attention.fast.kernels.triton_decode_fused_qkv import FusedQkvDecodeKernel
        from stages.m4_flash_attention.fast.kernels.triton_prefill import PrefillKernel
        from stages.m4_flash_attention.fast.kernels.triton_store import rotate_and_store

        kind = shape.head_dim, shape.dtype, shape.device
        self._rotate_and_store, self._launch = rotate_and_store, launch_options(shape.device)
        self._decode = DecodeKernel(shape.num_kv_heads, shape.group, *kind)
        self._fused_qkv = FusedQkvDecodeKernel(shape.num_heads, *kind)
        self._prefill = PrefillKernel(shape.num_heads, *kind)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        step, decodes = self._batch, self._batch.num_decodes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            self._decode(q[:decodes], kv, step.block_tables, step.seq_lens[:decodes], out)
        if decodes < step.num_seqs:
            sequences = step.block_tables[decodes:], step.seq_lens[decodes:], step.query_start_loc[decodes:]
            self._prefill(q, kv, *sequences, len(q) - decodes, out)
        return out

    def fuses_qkv(self) -> bool:
        return True

    def fused_qkv(
        self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        """One kernel for a single decode; for anything else two."""
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        step = self._batch
        if step.num_decodes == step.num_seqs == 1:
            return self._fused_qkv(qkv, norms, cos, sin, kv, step.slot_mapping, step.block_tables, step.seq_lens)
        self._rotate_and_store(qkv, norms, cos, sin, kv, step.slot_mapping, self._launch)
        return self.attend(qkv[:, : layer.num_heads], kv)


create = TritonBackend
