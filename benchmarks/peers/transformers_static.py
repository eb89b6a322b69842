"""transformers' `generate` in static batches: those that have arrived, padded on the left, until the longest ends."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.contestant import Contestant, OnTokens, Setting
from benchmarks.peers.hf_model import load_hf_model
from benchmarks.recipes import BenchRequest
from benchmarks.record import Run, Timeline

PAD = 0


class StepClock(StoppingCriteria):
    """Called by `generate` after every step: notes the time of each wanted token, and ends rows that have theirs.
    `generate` still computes an ended row until the whole batch has ended; its further tokens are not counted."""

    def __init__(self, wanted: Sequence[int], device: torch.device, on_tokens: OnTokens) -> None:
        self._wanted = wanted
        self._device = device
        self._on_tokens = on_tokens
        self.times: list[list[float]] = [[] for _ in wanted]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        open_rows = [row for row, n in enumerate(self._wanted) if len(self.times[row]) < n]
        for row in open_rows:
            self.times[row].append(now)
        self._on_tokens(len(open_rows))
        ended = [len(times) >= n for times, n in zip(self.times, self._wanted, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class StaticTransformers(Contestant):
    def __init__(self, setting: Setting) -> None:
        self._model, self.note = load_hf_model(setting)
        self._setting = setting
        self.vocab_size: int = self._model.config.vocab_size

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        start = time.perf_counter()
        waiting = deque(requests)
        timelines: list[Timeline] = []
        self.outputs: list[list[int]] = []  # of the last run
        computed = wanted = widest = 0
        while waiting:
            time.sleep(max(0.0, start + waiting[0].arrival - time.perf_counter()))
            now = time.perf_counter() - start
            batch: list[BenchRequest] = []
            while waiting and len(batch) < self._setting.size.max_num_seqs and (not batch or waiting[0].arrival <= now):
                batch.append(waiting.popleft())
            times = self._batch(batch, on_tokens)
            timelines += [Timeline(start + r.arrival, t) for r, t in zip(batch, times, strict=True)]
            longest_in, longest_out = max(len(r.prompt) for r in batch), max(r.max_tokens for r in batch)
            computed += len(batch) * (longest_in + longest_out - 1)
            wanted += sum(len(r.prompt) + r.max_tokens - 1 for r in batch)
            widest = max(widest, len(batch))
        return Run(start, timelines, {"padding_share": 1 - wanted / computed, "peak_running": widest})

    @torch.inference_mode()
    def _batch(self, batch: Sequence[BenchRequest], on_tokens: OnTokens) -> list[list[float]]:
        longest, device = max(len(r.prompt) for r in batch), self._setting.device
        ids = torch.tensor([[PAD] * (longest - len(r.prompt)) + r.prompt for r in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch], device=device)
        clock = StepClock([r.max_tokens for r in batch], device, on_tokens)
        result = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(r.max_tokens for r in batch),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        rows = result[:, longest:].tolist()
        self.outputs += [row[: r.max_tokens] for row, r in zip(rows, batch, strict=True)]
        return clock.times
