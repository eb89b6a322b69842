"""Executes a plan: builds the step's tensors, runs the model, samples. Holds no queue and changes no request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from common.attention import Attention
from common.batch import RaggedBatch
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.request import Request, SampledToken
from common.sampler import SamplerOutput, sample

BuildBatch = Callable[[StepPlan, torch.device], RaggedBatch]


class Runner:
    """`submit(plan)` starts a step, `collect()` waits for the oldest one submitted; `execute` is both."""

    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        build_batch: BuildBatch,
        move_blocks: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.model = model
        self.attention = attention
        self._build_batch = build_batch
        self._move_blocks = move_blocks
        self._in_flight: deque[tuple[list[Request], SamplerOutput | None]] = deque()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        if self._move_blocks is not None:
            self._move_blocks(plan)
        batch = self._build_batch(plan, self.model.device)
        self.attention.begin(batch)
        hidden = self.model(batch.input_ids, batch.positions, self.attention.attend)
        rows = [(r, c.end) for c in plan.chunks if c.samples for r in (c.request, *c.forks)]
        requests = [request for request, _ in rows]
        output = None
        if rows:
            logits = self.model.logits(hidden[batch.logit_indices])
            output = sample(logits, requests, [position for _, position in rows])
        self._in_flight.append((requests, output))

    def collect(self) -> dict[str, SampledToken]:
        """The tokens of the oldest step in flight, by request id."""
        requests, output = self._in_flight.popleft()
        if output is None:
            return {}
        return {r.id: token for r, token in zip(requests, output.to_host(requests), strict=True)}

    def execute(self, plan: StepPlan) -> dict[str, SampledToken]:
        self.submit(plan)
        return self.collect()

    def forget(self) -> None:
        """Drop what is in flight, after a step that failed."""
        self._in_flight.clear()
