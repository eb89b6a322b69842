"""Executes a plan: builds the step's tensors, runs the model, samples. Holds no queue and changes no request."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.attention import Attention
from common.batch import RaggedBatch
from common.errors import UserError
from common.execution.cores import SharedCores
from common.execution.cuda_graphs import StepGraphs
from common.execution.upload import upload
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.request import Request, SampledToken
from common.sampler import SamplerOutput, sample
from common.sampling.prompt_scores import PromptScores, score_prompts
from common.watch.stopwatch import DeviceTime, Lap, Stopwatch

BuildBatch = Callable[[StepPlan, torch.device], RaggedBatch]


@dataclass(slots=True)
class LaunchedStep:
    """A step in flight: whose tokens it samples, what will be on the host, and where in it each token is. None: it
    samples nothing."""

    requests: list[Request]
    output: SamplerOutput | None
    places: Sequence[int]
    prompt_scores: list[PromptScores]
    lap: Lap


class Runner:
    """`submit(plan)` starts a step, `collect()` waits for the oldest one submitted; `execute` is both.

    On a GPU `submit` waits for nothing (but for m3's attention, and for blocks that are swapped): the step is queued
    behind the one before it, whose tokens it takes on the device where the host does not know them yet. At most two
    steps are in flight, so those are always the newest step's. `graphs`: steps that fit into one of them are replayed
    instead of launched kernel by kernel.
    """

    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        build_batch: BuildBatch,
        move_blocks: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.model = model
        self.attention = attention
        self.build_batch = build_batch
        self.graphs: StepGraphs | None = None
        self.device_time: DeviceTime | None = None  # of the step collected last, as are the
        self.prompt_scores: list[PromptScores] = []
        self._move_blocks = move_blocks
        self._cores = SharedCores() if model.device.type == "cpu" else None
        self._stopwatch = Stopwatch()
        self._launched: deque[LaunchedStep] = deque()
        self._rows: dict[Request, int] = {}  # the newest step's: where in `_tokens` each request's token is
        self._tokens = torch.zeros(0, dtype=torch.long)
        self._scores: list[PromptScores] = []  # the newest step's

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        if self._cores is not None:
            self._cores.follow()
        lap = Lap(self.model.device)
        self._scores = []
        try:
            output, places = self._start(plan)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {self.model.device} in a step of {plan.num_tokens} tokens: lower "
                "max_num_batched_tokens, max_num_seqs, kv_cache_memory or gpu_memory_utilization"
            ) from error
        output = output.start_copy() if places else None
        lap.stop()
        self._launched.append(LaunchedStep(plan.drawing, output, places, self._scores, lap))

    def collect(self) -> dict[str, SampledToken]:
        """The tokens of the oldest step in flight, by request id."""
        step = self._launched.popleft()
        self.device_time, self.prompt_scores = self._stopwatch.wait(step.lap), step.prompt_scores
        if step.output is None:
            return {}
        tokens = step.output.to_host(step.requests, step.places)
        return dict(zip([request.id for request in step.requests], tokens, strict=True))

    def execute(self, plan: StepPlan) -> dict[str, SampledToken]:
        self.submit(plan)
        return self.collect()

    def forget(self) -> None:
        """Drop what is in flight, after a step that failed, when the device is done with it."""
        while self._launched:
            self._stopwatch.wait(self._launched.popleft().lap)
        self._stopwatch.reset()
        self._rows = {}

    def _start(self, plan: StepPlan) -> tuple[SamplerOutput, Sequence[int]]:
        """Queue the step's work. Returns what is sampled, and where in it the token of each `plan.drawing` is."""
        if self._move_blocks is not None:
            self._move_blocks(plan)
        if self.graphs is not None:
            return self.graphs.start(plan, self._launch)
        hidden, requests = self._launch(plan), plan.drawing
        self._rows = {request: row for row, request in enumerate(requests)}
        if not requests:
            return SamplerOutput(self._tokens), []
        positions = [c.end for c in plan.chunks if c.samples for _ in (c, *c.forks)]
        if all(request.argmax_only for request in requests):
            output = SamplerOutput(self.model.likeliest(hidden))
        else:
            output = sample(self.model.logits(hidden), requests, positions, self.model.ops)
            output.token_ids = self.model.agree(output.token_ids)
        self._tokens = output.token_ids
        return output, range(len(requests))

    def _launch(self, plan: StepPlan) -> torch.Tensor:
        """The model, kernel by kernel: the hidden states [S, hidden] of the rows that are sampled."""
        batch = self.build_batch(plan, self.model.device)
        self._fill_in(plan, batch)
        self.attention.begin(batch)
        hidden = self.model(batch.input_ids, batch.positions, self.attention.attend)
        self._scores = score_prompts(self.model, plan, batch, hidden)
        return hidden[batch.logit_indices]

    def _fill_in(self, plan: StepPlan, batch: RaggedBatch) -> None:
        """Tokens that the step before has sampled, or will have when this one starts, go on without the host."""
        rows, tokens = (self._rows, self._tokens) if self.graphs is None else (self.graphs.slots, self.graphs.tokens)
        waiting = [(i, rows[c.request]) for i, c in enumerate(plan.chunks) if c.waits_for_token]
        if waiting:
            sequences, sampled = upload(self.model.device, *np.array(waiting).T)
            last = batch.query_start_loc[sequences + 1].long() - 1
            batch.input_ids.index_copy_(0, last, tokens[sampled])
