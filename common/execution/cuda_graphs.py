"""Steps as CUDA graphs: hundreds of kernels started by one call of the host.

Launching a step kernel by kernel takes the host longer than the GPU computes, for decodes and for short prompts.

A graph repeats what was captured, with the same shapes at the same addresses. So steps are captured once for each of a
few shapes, over tensors that never move, and a step of 13 sequences is run as one of 16: the three padding rows compute
token 0 at position 0, and write it into a spare block. A step with prompts has room for decodes first and for prompt
tokens behind them; where one prompt ends and the next one begins, attention reads on the device.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from common.attention import Attention
from common.execution.draws import KINDS, Draw, Kind, RequestDraws, draw_biased
from common.execution.garbage import no_garbage_collection
from common.execution.graph_inputs import GraphInputs, StepShape
from common.execution.step_inputs import HostBatch, StepBuilder
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.sampler import SamplerOutput, with_logprobs
from common.watch.progress import progress_bar

MAX_PROMPT_TOKENS = 4096  # longer steps keep a GPU busy while the host launches their kernels
FEW_DECODES = 8  # beside prompts; from there on four times as many each time


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
    """What is captured, the fewest rows first: many sizes of decodes alone, and few of them beside prompts."""
    beside = {FEW_DECODES << i for i in range(0, max_num_seqs.bit_length(), 2)}
    beside = {*(size for size in beside if size < max_num_seqs), max_num_seqs}
    shapes = [StepShape(size) for size in padded_sizes(max_num_seqs)]
    shapes += [StepShape(size, tokens) for tokens in prompt_sizes(max_num_tokens) for size in beside]
    return sorted(shapes, key=lambda shape: shape.rows)


class StepGraphs:
    """For each shape a graph of the model, which leaves the hidden states that are sampled in one place; and for each
    padded size and kind of draw a graph of the choice of tokens from there.

    What a request has drawn last lies in its slot of `tokens`, `slots` says which that is."""

    def __init__(
        self, model: Decoder, attention: Attention, draw: Draw, builder: StepBuilder, spare_block: int,
        max_model_len: int, shapes: list[StepShape],
    ) -> None:  # fmt: skip
        self._model, self._attention, self._draw, self._builder = model, attention, draw, builder
        self.shapes = shapes
        most, width, vocab = shapes[-1].decodes, model.config.hidden_size, model.config.vocab_size
        self.sizes = padded_sizes(most)
        self._requests = RequestDraws(most, vocab, model.device)
        self._inputs = GraphInputs(shapes[-1], max_model_len, builder.block_size, spare_block, self._requests)
        self.tokens, self.slots = self._inputs.tokens, builder.requests.known
        builder.requests.enter.append(self._requests.enter)
        self._hidden = torch.zeros(most, width, dtype=model.dtype, device=model.device)
        self._raw = torch.zeros(most, vocab, dtype=model.dtype, device=model.device)
        self._model_graphs: dict[StepShape, Recording] = {}
        self._draw_graphs: dict[tuple[int, Kind], Recording] = {}

    @torch.inference_mode()
    def capture(self, record: Record) -> None:
        """Largest first: the smaller ones then find room in the memory that it took."""
        draws = [(size, kind) for size in reversed(self.sizes) for kind in KINDS]
        count = len(self.shapes) + len(draws)
        with no_garbage_collection(), progress_bar("capturing CUDA graphs", count, show=None) as advance:
            for shape in reversed(self.shapes):
                self._model_graphs[shape] = record(lambda shape=shape: self._run_model(shape))
                advance(1)
            for size, kind in draws:
                self._draw_graphs[size, kind] = record(lambda size=size, kind=kind: self._choose(size, kind))
                advance(1)

    def drop(self) -> None:
        self._model_graphs.clear()
        self._draw_graphs.clear()

    def _run_model(self, shape: StepShape) -> None:
        batch = self._inputs.batch(shape)
        self._attention.begin(batch)
        hidden = self._model(batch.input_ids, batch.positions, self._attention.attend)
        torch.index_select(hidden, 0, batch.logit_indices, out=self._hidden[: shape.decodes])

    def _choose(self, size: int, kind: Kind) -> None:
        draws, model, hidden = self._inputs.draws(size, self._raw), self._model, self._hidden[:size]
        slots = draws.keys[:, -1]
        if model.splits_vocabulary and kind == Kind.LIKELIEST:
            self.tokens[slots] = model.likeliest(hidden)
            return
        draw_biased(self._draw, model.logits(hidden), draws, kind)
        if model.splits_vocabulary:
            self.tokens[slots] = model.agree(self.tokens[slots])

    def start(self, plan: StepPlan, launch: Callable[[StepPlan], torch.Tensor]) -> tuple[SamplerOutput, list[int]]:
        """Queue a step. Returns what is drawn, valid until the next step is started, and where in it the token of each
        request of `plan.drawing` is. launch: the same model kernel by kernel, for plans larger than every graph."""
        batch = self._builder.host(plan)
        count = len(batch.draw_slots)
        shape = (
            None if plan.scores_prompts else self._shape_of(batch)
        )  # a graph leaves the states that draw, and no others
        size = next(size for size in self.sizes if size >= count)
        if shape is not None:
            self._inputs.fill(batch, shape)
            self._model_graphs[shape].replay()
        else:
            self._inputs.fill_draws(batch, size)
            self._hidden[:count] = launch(plan)
        if not count:
            return SamplerOutput(self.tokens), []
        kind = Kind(np.bitwise_or.reduce(self._requests.kinds[batch.draw_slots]))
        self._requests.restrict(batch.draw_slots.tolist(), plan.drawing)
        self._draw_graphs[size, kind].replay()
        if not kind & Kind.MARKED or all(request.params.logprobs is None for request in plan.drawing):
            return SamplerOutput(self.tokens), batch.draw_slots.tolist()
        token_ids = self.tokens[self._inputs.draws(count, self._raw).keys[:, -1]]
        params = [request.params for request in plan.drawing]
        return with_logprobs(token_ids, self._raw[:count], params), list(range(count))

    def _shape_of(self, batch: HostBatch) -> StepShape | None:
        """The least rows that hold the batch; as many are sampled at most as there is room for decodes."""
        decodes, prompt_tokens = batch.num_decodes, len(batch.positions) - batch.num_decodes
        if len(batch.seq_lens) - decodes > self._inputs.max_prompts:
            return None
        decodes = max(decodes, len(batch.draw_slots))
        fitting = (s for s in self.shapes if s.decodes >= decodes and s.prompt_tokens >= prompt_tokens)
        return next(fitting, None)
