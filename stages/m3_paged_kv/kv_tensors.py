"""The blocks themselves: K and V of all layers in one tensor, and a second one on the CPU to swap into."""

import torch

from common.memory import allocate_kv
from common.models import Decoder
from common.plan import BlockCopies, StepPlan


class PagedKV:
    """blocks [layers, 2, num_blocks, block_size, Hkv, D] in the model's dtype; slot s of a layer is token
    `s % block_size` of block `s // block_size`."""

    def __init__(self, model: Decoder, num_blocks: int, block_size: int, num_cpu_blocks: int = 0) -> None:
        c = model.config
        shape = (c.num_layers, 2, num_blocks, block_size, c.num_kv_heads, c.head_dim)
        self.blocks = allocate_kv(shape, model.dtype, model.device)
        cpu_shape = (c.num_layers, 2, num_cpu_blocks, *shape[3:])
        pinned = model.device.type == "cuda" and num_cpu_blocks > 0
        self.cpu_blocks = allocate_kv(cpu_shape, model.dtype, torch.device("cpu"), pinned)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """k and v [T, Hkv, D] into slots [T]."""
        keys, values = self.blocks[layer].flatten(1, 2)  # each [num_blocks * block_size, Hkv, D]
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def move(self, plan: StepPlan) -> None:
        """Swap and copy as the plan says, before anything is computed: a block that is swapped out may be another
        request's a moment later."""
        self._copy(self.blocks, self.cpu_blocks, plan.swap_out)
        self._copy(self.cpu_blocks, self.blocks, plan.swap_in)
        self._copy(self.blocks, self.blocks, plan.copies)

    @staticmethod
    def _copy(source: torch.Tensor, target: torch.Tensor, pairs: BlockCopies) -> None:
        if not pairs:
            return
        froms, tos = torch.tensor(pairs).T
        moved = source.index_select(2, froms.to(source.device)).to(target.device)
        target.index_copy_(2, tos.to(target.device), moved)

    def nbytes(self) -> int:
        return self.blocks.nbytes
