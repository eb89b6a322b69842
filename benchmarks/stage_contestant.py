"""A stage on a workload: requests go in as they arrive, and the engine steps until nothing is left."""

import time
from collections.abc import Sequence

import stages
from benchmarks.arrivals import Arrivals
from benchmarks.contestant import OnTokens, Setting
from benchmarks.measure import AttentionClock
from benchmarks.recipes import BenchRequest
from benchmarks.record import Run, Timeline
from common import RequestOutput, SamplingParams
from common.config import stage_options
from common.memory import kv_bytes_per_token
from common.models.load import open_source

IDLE_SLEEP = 0.0002  # seconds; far below any latency that is reported


class StageContestant:
    def __init__(self, stage: str, setting: Setting) -> None:
        config = open_source(setting.model, setting.device).config
        options = {
            "max_num_seqs": setting.size.max_num_seqs,
            "max_model_len": setting.size.max_model_len,
            "kv_cache_memory": setting.size.kv_budget_tokens * kv_bytes_per_token(config, setting.dtype),
            **stage_options(stages.number(stage), setting.size.options),
            **setting.options,
        }
        self.vocab_size = config.vocab_size
        self.engine = stages.build(stage, model=setting.model, dtype=setting.dtype, device=setting.device, **options)
        chosen = self.engine.metrics()["attention"]
        graphs = "steps replayed from CUDA graphs" if self.engine.runner.graphs is not None else None
        self.note = "; ".join(str(note) for note in (chosen, graphs, self.engine.note) if note) or None

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        engine = self.engine
        engine.reset_metrics()
        arrivals = Arrivals(requests)
        numbers: dict[str, int] = {}  # of the requests, by the engine's id
        finished: dict[int, RequestOutput] = {}
        start = time.perf_counter()
        while arrivals.left or engine.has_unfinished:
            for due, number, prompt in arrivals.due(time.perf_counter() - start):
                params = SamplingParams(max_tokens=requests[number].max_tokens, ignore_eos=True)
                id = engine.add_request(prompt, params, arrival_time=start + due)  # it waited while a step was running
                numbers[id] = number
            if not engine.has_unfinished:
                arrivals.check_idle()
                time.sleep(IDLE_SLEEP)
                continue
            outputs = engine.step()
            arrivals.gained((numbers[output.request_id] for output in outputs), time.perf_counter() - start)
            for output in outputs:
                if output.finished:
                    index = numbers[output.request_id]
                    finished[index] = output
                    whole = output.prompt_token_ids + output.token_ids
                    arrivals.ended(index, whole, output.outputs[0].token_times[-1] - start)
            on_tokens(len(outputs))
        ended = [finished[index] for index in range(len(requests))]
        metrics = engine.metrics()
        metrics["kv_reserved_bytes"] = metrics["kv_reserved_peak_bytes"]
        return Run(start, [Timeline(o.arrival_time, o.outputs[0].token_times) for o in ended], metrics)

    def attention_clock(self) -> AttentionClock:
        engine = self.engine
        layers = engine.runner.model.config.num_layers
        return AttentionClock(
            engine.runner.attention,
            engine.config.torch_device,
            lambda: int(engine.metrics()["steps"] or 0) * layers,  # `run` has reset them
        )

    def close(self) -> None:
        self.engine.close()
