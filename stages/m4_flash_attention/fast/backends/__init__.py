"""Ways to compute attention over the paged cache. A module that lies here is a backend under its file's name:

`AUTO`: the devices on which `attention_backend=auto` tries it, and when: 0 first, by decode speed
(`python -m benchmarks attention`). `WHY`: what speaks for it, for the user.
`CAPTURABLE`: a step does nothing but queue kernels whose shapes follow from the batch's, so a CUDA graph can repeat it.
`why_not(shape)`: None where it can run, or the reason why it cannot, as the end of a sentence.
`create(shape)`: the backend, which imports whatever it needs.

A layer's cache is kv [2, num_blocks, block_size, Hkv, D]; slot s is block s // block_size, offset s % block_size.
"""

import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor  # not torch itself: a backend here has its name
from torch import device as Device
from torch import dtype as DType

from common.batch import RaggedBatch
from common.models.ops import Heads

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend needs to know before the first step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: DType
    device: Device

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


class Backend(ABC):
    """One step: `begin` once, then for each layer `store` and `attend`; or, in steps with `fuses_qkv`, `fused_qkv`,
    which also does what comes between the projection and attention."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = batch

    def store(self, kv: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, Hkv, D] (rows may lie apart) into their slots of one layer; here by PyTorch."""
        kv[0].flatten(0, 1).index_copy_(0, self._batch.slot_mapping, k)
        kv[1].flatten(0, 1).index_copy_(0, self._batch.slot_mapping, v)

    @abstractmethod
    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """q [T, Hq, D] (rows may lie apart) over one layer, causally; returns [T, Hq, D]."""

    def fuses_qkv(self) -> bool:
        """Can it do so in the step that has begun?"""
        return False

    def fused_qkv(self, layer: Heads, qkv: Tensor, cos: Tensor, sin: Tensor, kv: Tensor) -> Tensor:
        """qkv [T, Hq + 2 Hkv, D], cos and signed sin [T, 1, D]: norm, RoPE, store, attend; returns [T, Hq, D]."""
        raise NotImplementedError
