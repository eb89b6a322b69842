"""Several simulated replicas behind a router, in one virtual time."""

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.recipes import BenchRequest
from benchmarks.record import Timeline
from common.engine import Engine
from common.sampling_params import SamplingParams
from common.watch import clock
from common.watch.clock import VirtualClock

Router = Callable[[Sequence[int], Sequence[int]], int]
"""Called with a prompt and how many requests each replica has; returns a replica's number."""


def random_router(seed: int = 0) -> Router:
    dice = random.Random(seed)
    return lambda prompt, loads: dice.randrange(len(loads))


def round_robin(seed: int = 0) -> Router:
    turns = itertools.count(seed)
    return lambda prompt, loads: next(turns) % len(loads)


def two_choices(seed: int = 0) -> Router:
    """The one with fewer requests of two that are drawn (Mitzenmacher, 2001)."""
    dice = random.Random(seed)

    def choose(prompt: Sequence[int], loads: Sequence[int]) -> int:
        one, other = dice.randrange(len(loads)), dice.randrange(len(loads))
        return one if loads[one] <= loads[other] else other

    return choose


def prefix_aware(seed: int = 0, block: int = 64, slack: float = 1.5) -> Router:
    """Where most of the prompt's blocks have been sent before, unless every such replica has `slack` times the mean
    load (and 4 requests more); then, and for a new beginning, the better of two."""
    seen: defaultdict[int, set[int]] = defaultdict(set)
    otherwise = two_choices(seed)

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


def run(engines: Sequence[Engine], virtual: VirtualClock, requests: Iterator[BenchRequest], router: Router) -> Outcome:
    """All requests, which come in the order of their arrivals, to their ends. Each engine has its own device: it steps
    whenever its last step has ended and it has something to do."""
    finished: dict[int, Timeline] = {}
    loads, active = [0] * len(engines), [False] * len(engines)
    order, numbers = itertools.count(), itertools.count()
    events: list[tuple[float, int, int, bool]] = []  # time, order, replica, whether a request of it has ended
    prompts = cached = 0
    coming = next(requests, None)

    def step_at(time: float, index: int) -> None:
        heapq.heappush(events, (time, next(order), index, False))

    with clock.using(virtual):
        while coming is not None or events:
            if coming is not None and (not events or coming.arrival <= events[0][0]):
                index = router(coming.prompt, loads)
                params = SamplingParams(max_tokens=coming.max_tokens, ignore_eos=True)
                name = str(next(numbers))
                engines[index].add_request(coming.prompt, params, request_id=name, arrival_time=coming.arrival)
                loads[index] += 1
                if not active[index]:
                    active[index] = True
                    step_at(coming.arrival, index)
                coming = next(requests, None)
                continue
            virtual.time, _, index, ended = heapq.heappop(events)
            if ended:
                loads[index] -= 1
                continue
            engine = engines[index]
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id)] = Timeline(output.arrival_time, output.outputs[0].token_times)
                    heapq.heappush(events, (virtual.time, next(order), index, True))
                    prompts += len(output.prompt_token_ids)
                    cached += output.num_cached_tokens
            active[index] = engine.has_unfinished
            if active[index]:
                step_at(virtual.time, index)
    steps = sum(engine.watch.metrics.steps for engine in engines)
    return Outcome([finished[i] for i in range(len(finished))], steps, cached / prompts if prompts else 0.0)


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


def handed_over(
    requests: Sequence[BenchRequest], firsts: Sequence[Timeline], seconds_per_token: float
) -> Iterator[BenchRequest]:
    """What the decoding devices get: the prompts with their first tokens, once their keys and values have arrived."""
    moved = [
        replace(r, prompt=[*r.prompt, 0], max_tokens=r.max_tokens - 1, arrival=t.token_times[0] + seconds_per_token * len(r.prompt))
        for r, t in zip(requests, firsts, strict=True)
    ]  # fmt: skip
    return iter(moved)
