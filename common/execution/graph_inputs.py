"""What CUDA graphs read: tensors that never move, filled for each step."""

from dataclasses import dataclass
from math import prod
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from common.batch import RaggedBatch
from common.execution.draws import KEYS, POSITION, SETTINGS, Draws, RequestDraws
from common.execution.step_inputs import HostBatch
from common.execution.upload import aligned

T = TypeVar("T")

MAX_PROMPTS = 32
"""Most prompts in a replayed step. Attention starts programs for as many, and those of missing ones leave at once."""


class StepShape(NamedTuple):
    """The rows of a step: `decodes` sequences of one token each, then `prompt_tokens` of other sequences. Both parts
    may end in padding."""

    decodes: int
    prompt_tokens: int = 0

    @property
    def rows(self) -> int:
        return self.decodes + self.prompt_tokens


@dataclass(slots=True)
class Fields(Generic[T]):
    """What the host tells the device about a step of at most R rows and B sequences, N of them decodes:

    input_ids [R]  tokens that the host knows
    source [R]     where in (tokens, input_ids) each row's input token is
    positions [R], slot_mapping [R], seq_lens [B], query_start_loc [B + 1], block_tables [B, M]   as in `RaggedBatch`
    sampled [N]    the rows whose hidden states are wanted
    settings [N, SETTINGS], keys [N, KEYS]   how each of those draws its token, as in `Draws`
    """

    input_ids: T
    source: T
    positions: T
    slot_mapping: T
    sampled: T
    keys: T
    settings: T
    seq_lens: T
    query_start_loc: T
    block_tables: T


class GraphInputs:
    """The tensors in one piece of device memory; in front of them `tokens` [N + 1], what each slot's request has drawn
    last, which the device writes itself.

    The rest comes from pinned memory, in one copy but for the prompts' block tables. Two pieces of that take turns: the
    copy of the step in flight may not have begun when the next step is prepared.
    """

    def __init__(
        self, largest: StepShape, max_model_len: int, block_size: int, spare_block: int, requests: RequestDraws
    ) -> None:
        self.max_model_len, self._requests = max_model_len, requests
        device = requests.marks.device
        self.max_prompts = min(MAX_PROMPTS, largest.decodes) if largest.prompt_tokens else 0
        self._spare_slot = spare_block * block_size
        rows, sequences, width = largest.rows, largest.decodes + self.max_prompts, -(-max_model_len // block_size)
        self._layout: list[tuple[torch.dtype, tuple[int, ...]]] = [
            *[(torch.long, (rows,))] * 4,
            (torch.long, (largest.decodes,)),
            (torch.long, (largest.decodes, KEYS)),
            (torch.float32, (largest.decodes, SETTINGS)),
            (torch.int32, (sequences,)),
            (torch.int32, (sequences + 1,)),
            (torch.int32, (sequences, width)),  # last: of the largest part only the rows in use are copied
        ]
        self._begin = aligned(8 * (largest.decodes + 1))
        total = self._begin + sum(aligned(dtype.itemsize * prod(shape)) for dtype, shape in self._layout)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._fields = Fields(*self._parts(self._device))
        self._fields.slot_mapping.fill_(self._spare_slot)  # captured steps belong to no request
        self._lookup = self._device[: self._begin + 8 * rows].view(torch.long)  # tokens, then input_ids
        self._ids_at = self._begin // 8
        self.tokens = self._lookup[: largest.decodes + 1]
        self._row_bytes = 4 * width
        self._tables_at = total - aligned(sequences * self._row_bytes)
        places = (part.data_ptr() - self._device.data_ptr() for part in (self._fields.keys, self._fields.seq_lens))
        self._draws_at = tuple(places)

        pinned = device.type == "cuda"
        self._staging = [torch.zeros(total, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._host = [Fields(*(part.numpy() for part in self._parts(staging))) for staging in self._staging]
        self._turn = 0
        self._numbers = np.arange(largest.decodes + 1)
        self._own_ids = np.arange(self._ids_at, self._ids_at + rows)

    def _parts(self, memory: torch.Tensor) -> list[torch.Tensor]:
        parts: list[torch.Tensor] = []
        begin = self._begin
        for dtype, shape in self._layout:
            end = begin + dtype.itemsize * prod(shape)
            parts.append(memory[begin:end].view(dtype).view(shape))
            begin = aligned(end)
        return parts

    def prompts(self, shape: StepShape) -> int:
        return self.max_prompts if shape.prompt_tokens else 0

    def fill(self, batch: HostBatch, shape: StepShape) -> None:
        """Put a step in the place of the last one.

        Padding rows write to the spare block. Those of decodes read whatever block their table named last; those of
        prompts belong to no sequence, and attention leaves their result undefined. Neither result is read.
        """
        self._turn = 1 - self._turn
        host, decodes, first = self._host[self._turn], batch.num_decodes, shape.decodes
        _put(host.input_ids, batch.input_ids[:decodes], first, 0)
        _put(host.positions, batch.positions[:decodes], first, 0)
        _put(host.slot_mapping, batch.slot_mapping[:decodes], first, self._spare_slot)
        _put(host.seq_lens, batch.seq_lens[:decodes], first, 1)
        _put(host.sampled, batch.logit_indices, first, 0)
        host.query_start_loc[: first + 1] = self._numbers[: first + 1]
        host.block_tables[:decodes, : batch.block_tables.shape[1]] = batch.block_tables[:decodes]
        host.source[: shape.rows] = self._own_ids[: shape.rows]
        waiting = batch.query_start_loc[1:][batch.waiting] - 1
        if shape.prompt_tokens:
            self._fill_prompts(host, batch, shape)
            waiting = np.where(waiting < decodes, waiting, waiting + first - decodes)
        host.source[waiting] = batch.slots[batch.waiting]
        self._lay_out_draws(host, batch, first)
        self._copy(self._begin, self._tables_at + decodes * self._row_bytes)
        if num_prompts := len(batch.seq_lens) - decodes:
            prompts_at = self._tables_at + first * self._row_bytes
            self._copy(prompts_at, prompts_at + num_prompts * self._row_bytes)

    def _fill_prompts(self, host: Fields[np.ndarray], batch: HostBatch, shape: StepShape) -> None:
        """The rows behind those of decodes."""
        decodes, first, indices = batch.num_decodes, shape.decodes, batch.logit_indices
        shift, width = first - decodes, batch.block_tables.shape[1]  # shift: by the padding in front
        _put(host.input_ids[first:], batch.input_ids[decodes:], shape.prompt_tokens, 0)
        _put(host.positions[first:], batch.positions[decodes:], shape.prompt_tokens, 0)
        _put(host.slot_mapping[first:], batch.slot_mapping[decodes:], shape.prompt_tokens, self._spare_slot)
        _put(host.seq_lens[first:], batch.seq_lens[decodes:], self.max_prompts, 1)
        host.sampled[: len(indices)] += np.where(indices < decodes, 0, shift)
        ends = batch.query_start_loc[decodes + 1 :] + shift
        host.query_start_loc[first + 1 :] = batch.query_start_loc[-1] + shift
        host.query_start_loc[first + 1 : first + 1 + len(ends)] = ends
        host.block_tables[first : first + len(ends), :width] = batch.block_tables[decodes:]

    def fill_draws(self, batch: HostBatch, size: int) -> None:
        """Only how tokens are drawn, for a step that no graph computes."""
        self._turn = 1 - self._turn
        self._lay_out_draws(self._host[self._turn], batch, size)
        self._copy(*self._draws_at)

    def _lay_out_draws(self, host: Fields[np.ndarray], batch: HostBatch, size: int) -> None:
        """Of the rows that are sampled; padding up to `size` draws for the slot that belongs to no request."""
        count, kept = len(batch.draw_slots), self._requests
        _put(host.settings, kept.settings[batch.draw_slots], size, kept.settings[-1])
        _put(host.keys, kept.keys[batch.draw_slots], size, kept.keys[-1])
        host.keys[:count, POSITION] = batch.positions[batch.logit_indices] + 1

    def _copy(self, begin: int, end: int) -> None:
        self._device[begin:end].copy_(self._staging[self._turn][begin:end], non_blocking=True)

    def draws(self, size: int, raw: torch.Tensor) -> Draws:
        """raw [N, vocab]: see there."""
        fields = self._fields
        kept = self._requests
        given = fields.settings[:size], fields.keys[:size], kept.marks, self.tokens, raw[:size]
        return Draws(*given, kept.biased, kept.bias)

    def batch(self, shape: StepShape) -> RaggedBatch:
        """What a graph of this shape reads. Lengths are on the device, so the longest that may come counts."""
        fields, sequences = self._fields, shape.decodes + self.prompts(shape)
        return RaggedBatch(
            input_ids=self._lookup.index_select(0, fields.source[: shape.rows]),
            positions=fields.positions[: shape.rows],
            query_start_loc=fields.query_start_loc[: sequences + 1],
            seq_lens=fields.seq_lens[:sequences],
            logit_indices=fields.sampled[: shape.decodes],
            max_query_len=max(1, shape.prompt_tokens),
            max_seq_len=self.max_model_len,
            num_decodes=shape.decodes,
            slot_mapping=fields.slot_mapping[: shape.rows],
            block_tables=fields.block_tables[:sequences],
        )


def _put(target: np.ndarray, values: np.ndarray, room: int, padding: int | np.ndarray) -> None:
    """Values from the beginning on, then padding, `room` in all."""
    target[: len(values)] = values
    target[len(values) : room] = padding
