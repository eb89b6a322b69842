"""A stage on a workload: requests go in as they arrive, and the engine steps until nothing is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import stages
from benchmarks.contestant import OnTokens, Setting
from benchmarks.probe import AttentionClock
from benchmarks.record import METRIC_FIELDS, Run, Timeline
from benchmarks.workloads import BenchRequest
from common import RequestOutput, SamplingParams
from common.memory import kv_bytes_per_token
from common.models.load import open_source

IDLE_SLEEP = 0.002  # seconds; far below any latency that is reported


class StageContestant:
    note: str | None = None

    def __init__(self, stage: str, setting: Setting) -> None:
        config = open_source(setting.model, setting.device).config
        options = {
            "max_num_seqs": setting.max_num_seqs,
            "max_model_len": setting.max_model_len,
            "kv_cache_memory": setting.kv_tokens * kv_bytes_per_token(config, setting.dtype),
            **setting.options,
        }
        self.vocab_size = config.vocab_size
        self.engine = stages.build(stage, model=setting.model, dtype=setting.dtype, device=setting.device, **options)

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        engine = self.engine
        engine.reset_metrics()
        finished: dict[str, RequestOutput] = {}
        ids: list[str] = []
        waiting = deque(requests)
        start = time.perf_counter()
        while waiting or engine.has_unfinished:
            while waiting and start + waiting[0].arrival <= time.perf_counter():
                ids.append(self._add(waiting.popleft(), start))
            if not engine.has_unfinished:
                time.sleep(IDLE_SLEEP)
                continue
            outputs = engine.step()
            finished.update((output.request_id, output) for output in outputs if output.finished)
            on_tokens(len(outputs))
        timelines = [Timeline(finished[i].arrival_time, finished[i].outputs[0].token_times) for i in ids]
        return Run(start, timelines, self._metrics())

    def _add(self, request: BenchRequest, start: float) -> str:
        """A request that fell due while a step was running has waited since then, not since we noticed."""
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        return self.engine.add_request(request.prompt, params, arrival_time=start + request.arrival)

    def _metrics(self) -> dict[str, float | int | str | None]:
        metrics = self.engine.metrics()
        named = {name: metrics.get(name) for name in METRIC_FIELDS}
        named["kv_reserved_bytes"] = metrics.get("kv_reserved_peak_bytes")
        return named

    def attention_clock(self) -> AttentionClock:
        engine = self.engine
        layers = engine.runner.model.config.num_layers

        def expected_calls() -> int:
            return int(engine.metrics()["steps"] or 0) * layers  # `run` has reset them

        return AttentionClock(engine.runner.attention, engine.config.torch_device, expected_calls)

    def close(self) -> None:
        self.engine.close()
