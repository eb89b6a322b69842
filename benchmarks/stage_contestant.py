"""A stage on a workload: requests go in as they arrive (by the clock, by the tokens of others, or at their
ends), and the engine steps until nothing is left."""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import stages
from benchmarks.contestant import OnTokens, Setting
from benchmarks.measure import AttentionClock
from benchmarks.recipes import STEADY, BenchRequest
from benchmarks.record import Run, Timeline
from common import Engine, RequestOutput, SamplingParams
from common.config import stage_options
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.watch import clock

IDLE_SLEEP = 0.0002  # seconds; far below any latency that is reported


class Arrival(NamedTuple):
    """A request that is due. time: since when, in seconds after the start; prompt: the whole of it."""

    time: float
    number: int
    prompt: list[int]


class Arrivals:
    """Hands out each request once. Its caller reports every token (`gained`) and every end (`ended`)."""

    def __init__(self, requests: Sequence[BenchRequest]) -> None:
        self._requests = requests
        by_the_clock = [(i, r) for i, r in enumerate(requests) if r.after_tokens is None and r.follows is None]
        self._due = [Arrival(r.arrival, i, r.prompt) for i, r in by_the_clock]
        heapq.heapify(self._due)
        self._made = {index: 0 for index, request in enumerate(requests) if request.group == STEADY}
        triggers = [(r.after_tokens, i) for i, r in enumerate(requests) if r.after_tokens is not None]
        self._triggers = deque(sorted(triggers))
        self._followers: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.follows is not None:
                self._followers[request.follows].append(index)
        self.left = len(requests)  # requests that have not been handed out

    def due(self, now: float) -> list[Arrival]:
        """Those that have arrived by now, seconds after the start."""
        found: list[Arrival] = []
        while self._due and self._due[0].time <= now:
            found.append(heapq.heappop(self._due))
        self.left -= len(found)
        return found

    def check_idle(self) -> None:
        """With nothing running, only the clock can bring the next one."""
        if self.left and not self._due:
            raise RuntimeError(f"{self.left} requests wait for tokens that no request makes: the workload is wrong")

    def gained(self, indices: Iterable[int], now: float) -> None:
        """These requests have a token more."""
        if not self._triggers:
            return
        for index in indices:
            if index in self._made:
                self._made[index] += 1
        slowest = min(self._made.values(), default=0)
        while self._triggers and self._triggers[0][0] <= slowest:
            _, index = self._triggers.popleft()
            heapq.heappush(self._due, Arrival(now, index, self._requests[index].prompt))

    def ended(self, index: int, whole: list[int], at: float) -> None:
        """A request has its last token. whole: its prompt and output; at: when that token came."""
        for follower in self._followers.pop(index, ()):
            request = self._requests[follower]
            heapq.heappush(self._due, Arrival(at + request.arrival, follower, whole[: request.keep] + request.prompt))


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
        return drive(self.engine, requests, on_tokens)

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


def drive(engine: Engine, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
    """Run all requests to their ends, on the clock that the engine reads."""
    engine.reset_metrics()
    arrivals = Arrivals(requests)
    numbers: dict[str, int] = {}  # of the requests, by the engine's id
    finished: dict[int, RequestOutput] = {}
    start = clock.now()
    while arrivals.left or engine.has_unfinished:
        for due, number, prompt in arrivals.due(clock.now() - start):
            params = SamplingParams(max_tokens=requests[number].max_tokens, ignore_eos=True)
            id = engine.add_request(prompt, params, arrival_time=start + due)  # it waited while a step was running
            numbers[id] = number
        if not engine.has_unfinished:
            arrivals.check_idle()
            clock.sleep(IDLE_SLEEP)
            continue
        outputs = engine.step()
        arrivals.gained((numbers[output.request_id] for output in outputs), clock.now() - start)
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
