"""The lesson, `naive`, behind a backend's face: for benches and tests that compare one layer."""

from __future__ import annotations

import torch

from common.batch import RaggedBatch
from stages.m4_flash_attention.attention import flash_attention
from stages.m4_flash_attention.fast.backends import AttentionShape, store_rows

AUTO: dict[str, int] = {}  # only where it is asked for
WHY = "the definition"
CAPTURABLE = False


def why_not(shape: AttentionShape) -> str | None:
    return None


def create(shape: AttentionShape) -> Definition:
    return Definition()


class Definition:
    def begin(self, batch: RaggedBatch) -> None:
        self._batch, self._sequences = batch, batch.sequences()

    def store(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        store_rows(kv, k, v, self._batch.slot_mapping)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return flash_attention(q, kv[0], kv[1], self._batch.block_tables.tolist(), self._sequences)
