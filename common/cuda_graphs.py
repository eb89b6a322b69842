"""Decode steps as CUDA graphs: hundreds of kernels started by one call of the host.

A graph repeats what was captured, with the same shapes at the same addresses. So a decode step is captured once for
each of a few batch sizes, over tensors that never move, and a step of 13 sequences is run as one of 16: the three
padding rows decode token 0 at position 0 into a spare block that nobody owns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from common.attention import Attention
from common.batch import RaggedBatch, RaggedBuilder
from common.config import EngineConfig
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.progress import progress_bar
from common.upload import aligned

if TYPE_CHECKING:
    from common.runner import Runner


class Recording(Protocol):
    """What `torch.cuda.CUDAGraph` is to us."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], None]], Recording]
"""Runs a function once and returns something that repeats it."""


class CudaRecorder:
    """Captures functions in CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Recording:
        function()  # compiles kernels and makes workspaces, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph


def padded_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `max_num_seqs` itself, whatever it is."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def capture_decodes(
    runner: Runner,
    config: EngineConfig,
    max_model_len: int,
    spare_block: int,
    record: Record | None = None,
    progress: bool | None = None,
) -> None:
    """Give the runner its graphs. `spare_block`: a block of the KV tensors that the KV cache manager does not know."""
    assert isinstance(runner.build_batch, RaggedBuilder)
    inputs = DecodeInputs(config.max_num_seqs, max_model_len, config.block_size, spare_block, runner.model.device)
    runner.graphs = DecodeGraphs(runner.model, runner.attention, runner.build_batch, inputs)
    runner.graphs.capture(record or CudaRecorder(), progress)


class DecodeInputs:
    """The tensors that the graphs read, at most `max_num_seqs` (N) rows each, in one piece of device memory:

    tokens [N]   what the step before sampled; written by the device
    ids [N]      tokens that the host knows
    source [N]   where in (tokens, ids) each row's input token stands
    positions, slots, seq_lens [N], tables [N, M]   as in `RaggedBatch`

    All but `tokens` is filled by one copy a step from pinned memory. There are two of these, used in turn: the copy of
    the step in flight may not have begun when the next step is prepared.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, spare_block: int, device: torch.device
    ) -> None:
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self._spare_block, self._block_size = spare_block, block_size
        rows, width = max_num_seqs, -(-max_model_len // block_size)
        self._row_bytes = 4 * width
        wide, narrow = aligned(8 * rows), aligned(4 * rows)
        starts = np.cumsum([0, wide, wide, wide, wide, wide, narrow]).tolist()  # ..., seq_lens, tables
        total = starts[-1] + rows * self._row_bytes

        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._lookup = self._device[: starts[2]].view(torch.long)  # tokens, then ids
        self._ids_at = wide // 8
        self.tokens = self._lookup[:rows]
        parts = [self._device[a:b] for a, b in zip(starts, [*starts[1:], total], strict=True)]
        _, _, source, positions, slots, seq_lens, tables = parts
        self._source, self._positions, self._slots = (x.view(torch.long)[:rows] for x in (source, positions, slots))
        self._seq_lens = seq_lens.view(torch.int32)[:rows]
        self._tables = tables.view(torch.int32).view(rows, width)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

        self._copied_from, self._tables_at = starts[1], starts[-1]
        pinned = device.type == "cuda"
        self._staging = [torch.zeros(total, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._views = [self._host_views(staging.numpy(), starts, rows, width) for staging in self._staging]
        self._turn = 0

    @staticmethod
    def _host_views(memory: np.ndarray, starts: list[int], rows: int, width: int) -> list[np.ndarray]:
        longs = [memory[start : start + 8 * rows].view(np.int64) for start in starts[1:5]]
        seq_lens = memory[starts[5] : starts[5] + 4 * rows].view(np.int32)
        return [*longs, seq_lens, memory[starts[6] :].view(np.int32).reshape(rows, width)]

    def fill(self, builder: RaggedBuilder, plan: StepPlan, size: int, sampled: Mapping[str, int]) -> None:
        """Put a plan of decodes, padded to `size` rows, in the place of the last one. `sampled`: where in `tokens`
        stands what a request sampled in the step before."""
        self._turn = 1 - self._turn
        ids, source, positions, slots, seq_lens, tables = self._views[self._turn]
        batch, count = builder.host(plan), len(plan.chunks)
        ids[:count], positions[:count], slots[:count] = batch.input_ids, batch.positions, batch.slots
        seq_lens[:count] = batch.ends
        source[:count] = [
            sampled[chunk.request.id] if chunk.waits_for_token else self._ids_at + row
            for row, chunk in enumerate(plan.chunks)
        ]
        tables[:count, : batch.tables.shape[1]] = batch.tables
        self._pad_and_copy(count, size)

    def fill_with_padding(self, size: int) -> None:
        self._pad_and_copy(0, size)

    def _pad_and_copy(self, count: int, size: int) -> None:
        ids, source, positions, slots, seq_lens, tables = self._views[self._turn]
        padding = slice(count, size)
        ids[padding], positions[padding], seq_lens[padding] = 0, 0, 1
        source[padding] = np.arange(self._ids_at + count, self._ids_at + size)
        slots[padding] = self._spare_block * self._block_size
        tables[padding, 0] = self._spare_block
        used = slice(self._copied_from, self._tables_at + size * self._row_bytes)
        self._device[used].copy_(self._staging[self._turn][used], non_blocking=True)

    def batch(self, size: int) -> RaggedBatch:
        """What a graph of so many rows reads. Lengths are on the device, so the longest that may come counts."""
        return RaggedBatch(
            input_ids=self._lookup.index_select(0, self._source[:size]),
            positions=self._positions[:size],
            query_start_loc=self._query_starts[: size + 1],
            seq_lens=self._seq_lens[:size],
            logit_indices=self._query_starts[:size],
            max_query_len=1,
            max_seq_len=self.max_model_len,
            num_decodes=size,
            slot_mapping=self._slots[:size],
            block_tables=self._tables[:size],
        )


class DecodeGraphs:
    """For each padded size two graphs: the model, up to the hidden states, and the greedy choice of tokens from them.
    The second is left out where somebody wants more than the likeliest token."""

    def __init__(self, model: Decoder, attention: Attention, builder: RaggedBuilder, inputs: DecodeInputs) -> None:
        self._model, self._attention, self._builder, self._inputs = model, attention, builder, inputs
        self.sizes = padded_sizes(inputs.max_num_seqs)
        self._hidden: dict[int, torch.Tensor] = {}
        self._model_graphs: dict[int, Recording] = {}
        self._choice_graphs: dict[int, Recording] = {}

    @torch.inference_mode()
    def capture(self, record: Record, progress: bool | None = None) -> None:
        """Largest first: the smaller ones then find room in the memory that it took."""
        with progress_bar("capturing CUDA graphs", len(self.sizes), show=progress) as advance:
            for size in reversed(self.sizes):
                self._inputs.fill_with_padding(size)
                self._model_graphs[size] = record(lambda size=size: self._run_model(size))
                self._choice_graphs[size] = record(lambda size=size: self._choose(size))
                advance(1)

    def _run_model(self, size: int) -> None:
        batch = self._inputs.batch(size)
        self._attention.begin(batch)
        self._hidden[size] = self._model(batch.input_ids, batch.positions, self._attention.attend)

    def _choose(self, size: int) -> None:
        self._inputs.tokens[:size].copy_(self._model.ops.pick(self._model.logits(self._hidden[size])))

    def takes(self, plan: StepPlan) -> bool:
        """Decodes and nothing else. (A prompt's last token alone is a decode too.)"""
        fits = len(plan.chunks) <= self.sizes[-1]
        return fits and all(c.length == 1 and c.samples and not c.forks for c in plan.chunks)

    def hidden_states(self, plan: StepPlan, rows: Mapping[str, int], tokens: torch.Tensor) -> torch.Tensor:
        """[B, hidden]. rows, tokens: where in `tokens` stands what each request sampled in the step before."""
        return self._hidden[self._replay(plan, rows, tokens)][: len(plan.chunks)]

    def next_tokens(self, plan: StepPlan, rows: Mapping[str, int], tokens: torch.Tensor) -> torch.Tensor:
        """[B]: the likeliest token of each sequence, valid until the next step is started."""
        self._choice_graphs[self._replay(plan, rows, tokens)].replay()
        return self._inputs.tokens[: len(plan.chunks)]

    def _replay(self, plan: StepPlan, rows: Mapping[str, int], tokens: torch.Tensor) -> int:
        """Run the model; returns the padded size."""
        size = next(size for size in self.sizes if size >= len(plan.chunks))
        if tokens.data_ptr() != self._inputs.tokens.data_ptr():  # the step before was no greedy replay
            self._inputs.tokens[: len(tokens)].copy_(tokens)
        self._inputs.fill(self._builder, plan, size, rows)
        self._model_graphs[size].replay()
        return size
