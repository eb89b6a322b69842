"""Steps as CUDA graphs: hundreds of kernels started by one call of the host.

Launching a step kernel by kernel takes the host longer than the GPU computes, for decodes and for short prompts.

A graph repeats what was captured, with the same shapes at the same addresses. So steps are captured once for each of a
few shapes, over tensors that never move, and a step of 13 sequences is run as one of 16: the three padding rows compute
token 0 at position 0, and write it into a spare block. A step with prompts has room for decodes first and for prompt
tokens behind them; where one prompt ends and the next one begins, attention reads on the device.
"""

import gc
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from common.attention import Attention
from common.execution.graph_inputs import GraphInputs, StepShape
from common.execution.step_inputs import HostBatch, StepBuilder
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.watch.progress import progress_bar

MAX_PROMPT_TOKENS = 4096  # longer steps keep a GPU busy while the host launches their kernels
FEW_DECODES = 8  # a short prompt with few decodes does not need `max_num_seqs` rows

_CAPTURING = threading.Lock()


class Recording(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], None]], Recording]  # runs a function once and returns something that repeats it


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


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """The garbage collector may free another engine's tensors, graphs and events, by calls that CUDA forbids during a
    capture. Both the collector and the ban are the whole process's: one engine captures at a time."""
    with _CAPTURING:
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def padded_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `max_num_seqs` itself, whatever it is."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def prompt_sizes(max_num_tokens: int) -> list[int]:
    """64, 128, 256, and from there on in steps of a half and a third, so that no more than a third is padding: 384,
    512, 768, 1024, ... up to `max_num_tokens` itself or `MAX_PROMPT_TOKENS`, whichever is less."""
    most = min(max_num_tokens, MAX_PROMPT_TOKENS)
    powers = [64 << i for i in range(7)]
    sizes = {most, *powers, *(3 * power // 2 for power in powers if power >= 256)}
    return sorted(size for size in sizes if size <= most)


def step_shapes(max_num_seqs: int, max_num_tokens: int) -> list[StepShape]:
    """What is captured, the fewest rows first. With many prompt tokens the room for decodes does not matter."""
    shapes = [StepShape(size) for size in padded_sizes(max_num_seqs)]
    for tokens in prompt_sizes(max_num_tokens):
        shapes.append(StepShape(max_num_seqs, tokens))
        if max_num_seqs > FEW_DECODES and tokens < 4 * max_num_seqs:
            shapes.append(StepShape(FEW_DECODES, tokens))
    return sorted(shapes, key=lambda shape: shape.rows)


class StepGraphs:
    """For each shape a graph of the model, which leaves the hidden states that are sampled in one place; and for each
    padded size a graph of the greedy choice of tokens from there, for steps in which no request samples."""

    def __init__(
        self, model: Decoder, attention: Attention, builder: StepBuilder, inputs: GraphInputs, shapes: list[StepShape]
    ) -> None:
        self._model, self._attention, self._builder, self._inputs = model, attention, builder, inputs
        self.shapes = shapes
        self.sizes = padded_sizes(inputs.largest.decodes)
        width = model.config.hidden_size
        self._hidden = torch.zeros(inputs.largest.decodes, width, dtype=model.dtype, device=model.device)
        self._model_graphs: dict[StepShape, Recording] = {}
        self._choice_graphs: dict[int, Recording] = {}

    @torch.inference_mode()
    def capture(self, record: Record) -> None:
        """Largest first: the smaller ones then find room in the memory that it took."""
        count = len(self.shapes) + len(self.sizes)
        with no_garbage_collection(), progress_bar("capturing CUDA graphs", count, show=None) as advance:
            for shape in reversed(self.shapes):
                self._model_graphs[shape] = record(lambda shape=shape: self._run_model(shape))
                advance(1)
            for size in reversed(self.sizes):
                self._choice_graphs[size] = record(lambda size=size: self._choose(size))
                advance(1)

    def _run_model(self, shape: StepShape) -> None:
        batch = self._inputs.batch(shape)
        self._attention.begin(batch)
        hidden = self._model(batch.input_ids, batch.positions, self._attention.attend)
        torch.index_select(hidden, 0, batch.logit_indices, out=self._hidden[: shape.decodes])

    def _choose(self, size: int) -> None:
        self._inputs.tokens[:size].copy_(self._model.ops.sample(self._model.logits(self._hidden[:size])))

    def hidden_states(self, plan: StepPlan, rows: Mapping[str, int], tokens: torch.Tensor) -> torch.Tensor | None:
        """Run the model. Returns the hidden states [S, hidden] of the rows that are sampled, valid until the next step
        is started, or None where the plan is larger than every graph.

        rows, tokens: where in `tokens` each request's sample of the step before is.
        """
        batch = self._builder.host(plan)
        shape = self._shape_of(batch)
        if shape is None:
            return None
        if tokens.data_ptr() != self._inputs.tokens.data_ptr():  # the step before chose otherwise than `next_tokens`
            self._inputs.tokens[: len(tokens)].copy_(tokens)
        self._inputs.fill(plan, batch, shape, rows)
        self._model_graphs[shape].replay()
        return self._hidden[: len(batch.logit_indices)]

    def next_tokens(self, count: int) -> torch.Tensor:
        """[count]: the likeliest token of each of the `hidden_states`, valid until the next step is started."""
        self._choice_graphs[next(size for size in self.sizes if size >= count)].replay()
        return self._inputs.tokens[:count]

    def _shape_of(self, batch: HostBatch) -> StepShape | None:
        """The least rows that hold the batch; as many are sampled at most as there is room for decodes."""
        decodes, prompt_tokens = batch.num_decodes, len(batch.positions) - batch.num_decodes
        if len(batch.seq_lens) - decodes > self._inputs.max_prompts:
            return None
        decodes = max(decodes, len(batch.logit_indices))
        fitting = (s for s in self.shapes if s.decodes >= decodes and s.prompt_tokens >= prompt_tokens)
        return next(fitting, None)
