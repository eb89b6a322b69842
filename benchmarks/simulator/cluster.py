"""Several simulated replicas behind a router, in one virtual time."""

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.recipes import BenchRequest
from benchmarks.record import Timeline
from common.engine import Engine
from common.sampling_params import SamplingParams
from common.watch import clock
from common.watch.clock import VirtualClock

Router = Callable[[Sequence[int], Sequence[int]], int]
"""Called with a prompt and how many requests each replica has; returns a replica's number."""


def random_router() -> Router:
    dice = random.Random(0)
    return lambda prompt, loads: dice.randrange(len(loads))


def round_robin() -> Router:
    turns = itertools.count()
    return lambda prompt, loads: next(turns) % len(loads)


def two_choices() -> Router:
    """Of two that are drawn, the one with fewer requests (Mitzenmacher, 2001)."""
    dice = random.Random(0)
    return lambda prompt, loads: min((dice.randrange(len(loads)) for _ in range(2)), key=loads.__getitem__)


def prefix_aware(block: int = 64, slack: float = 1.5) -> Router:
    """Where most of the prompt's blocks have been sent before, unless every such replica has `slack` times the mean
    load (and 4 requests more); then, and for a new beginning, the better of two."""
    seen: defaultdict[int, set[int]] = defaultdict(set)
    otherwise = two_choices()

    def choose(prompt: Sequence[int], loads: Sequence[int]) -> int:
        keys: list[int] = []
        for start in range(0, len(prompt) - block + 1, block):
            keys.append(hash((keys[-1] if keys else 0, *prompt[start : start + block])))
        limit = slack * sum(loads) / len(loads) + 4
        known = (min(seen[key], key=loads.__getitem__) for key in reversed(keys) if key in seen)
        best = next((replica for replica in known if loads[replica] <= limit), None)
        chosen = otherwise(prompt, loads) if best is None else best
        for key in keys:
            seen[key].add(chosen)
        return chosen

    return choose


ROUTERS = {
    "random": random_router,
    "round robin": round_robin,
    "two choices": two_choices,
    "prefix-aware": prefix_aware,
}


@dataclass
class Outcome:
    """What the requests saw, in their order; engine steps in all; share of the prompt tokens found in caches."""

    timelines: list[Timeline]
    steps: int
    hit_rate: float


def run(engines: Sequence[Engine], virtual: VirtualClock, requests: Iterable[BenchRequest], router: Router) -> Outcome:
    """All requests, which come in the order of their arrivals, to their ends. Each engine has its own device: it steps
    whenever its last step has ended and it has something to do."""
    finished: dict[int, Timeline] = {}
    loads, order = [0] * len(engines), itertools.count()
    events: list[tuple[float, int, int, bool]] = []  # time, order, replica, and whether it steps or is rid of a request
    idle, prompts, cached = set(range(len(engines))), 0, 0
    coming = enumerate(requests)
    number, request = next(coming, (0, None))
    with clock.using(virtual):
        while request is not None or events:
            if request is not None and (not events or request.arrival <= events[0][0]):
                index = router(request.prompt, loads)
                params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
                arrival = virtual.time = request.arrival
                engines[index].add_request(request.prompt, params, request_id=str(number), arrival_time=arrival)
                loads[index] += 1
                if index in idle:
                    idle.remove(index)
                    heapq.heappush(events, (arrival, next(order), index, True))
                number, request = next(coming, (0, None))
                continue
            virtual.time, _, index, steps = heapq.heappop(events)
            if not steps:
                loads[index] -= 1
                continue
            for output in engines[index].step():
                if output.finished:
                    finished[int(output.request_id)] = Timeline(output.arrival_time, output.outputs[0].token_times)
                    heapq.heappush(events, (virtual.time, next(order), index, False))
                    prompts += len(output.prompt_token_ids)
                    cached += output.num_cached_tokens
            if engines[index].has_unfinished:
                heapq.heappush(events, (virtual.time, next(order), index, True))
            else:
                idle.add(index)
    num_steps = sum(engine.watch.metrics.steps for engine in engines)
    return Outcome([finished[i] for i in range(len(finished))], num_steps, cached / max(1, prompts))


def traffic(
    rate: float, seconds: float, prompt: tuple[int, int], output: tuple[int, int], groups: int = 0, shared: int = 0,
    seed: int = 0,
) -> Iterator[BenchRequest]:  # fmt: skip
    """A Poisson process of `rate` requests a second with lengths uniform in the spans, made when they are needed. With
    `groups`, each prompt begins with the `shared` tokens of one of them. Tokens are below 256."""
    dice = random.Random(seed)
    beginnings = [list(dice.randbytes(shared)) for _ in range(groups)]
    time = dice.expovariate(rate)
    while time < seconds:
        beginning = dice.choice(beginnings) if beginnings else []
        tokens = beginning + list(dice.randbytes(dice.randint(*prompt)))
        yield BenchRequest(tokens, dice.randint(*output), arrival=time)
        time += dice.expovariate(rate)
