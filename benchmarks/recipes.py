"""What requests are made of: recipes, which a workload names with its numbers.

Everything is seeded with `random.Random.random()`, whose sequence Python guarantees, so that a workload is the same on
every machine.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

SEED = 20261101

Span = tuple[int, int]  # lowest and highest value, both included

STEADY, LONG, SHORT = "steady", "long", "short"  # groups of `interference`
BLOCK = 16  # tokens of a block of KV cache, unless an option says otherwise: what prompts share ends with one


@dataclass(frozen=True)
class BenchRequest:
    """Token ids in, exactly `max_tokens` tokens out (end-of-sequence tokens are ignored).

    A request is submitted by the clock, or when something has happened in the run itself:

    arrival: seconds after the start of the run, or, with `follows`, after the end of that request.
    group: whose figures are also taken apart from the others'; the `STEADY` group's gaps are the run's `itl_s`.
    after_tokens: it arrives when every request of the `STEADY` group has made this many tokens.
    follows, keep: it arrives when the timed request of that number has ended, and its prompt begins with the first
        `keep` tokens of that one's prompt and answer.
    warm: it runs before the clock starts, and is not part of the figures.
    """

    prompt: list[int]
    max_tokens: int
    arrival: float = 0.0
    group: str = ""
    after_tokens: int | None = None
    follows: int | None = None
    keep: int = 0
    warm: bool = False

    @property
    def prompt_length(self) -> int:
        return self.keep + len(self.prompt)


class Draw:
    """The dice of one run. Lengths and arrival times are the same in every run; the token ids differ from run to run,
    so that a prefix cache which outlives a run finds nothing of it in the next."""

    def __init__(self, vocab_size: int, run: int = 0) -> None:
        self._vocab_size = vocab_size
        self._shape = random.Random(SEED)
        self._tokens = random.Random(SEED + 1 + run)

    def tokens(self, count: int) -> list[int]:
        return [int(self._tokens.random() * self._vocab_size) for _ in range(count)]

    def length(self, span: Span) -> int:
        low, high = span
        return low + int(self._shape.random() * (high - low + 1))

    def gap(self, rate: float) -> float:
        """Seconds until the next arrival of a Poisson process with `rate` arrivals a second."""
        return self._shape.expovariate(rate)

    def marked(self, count: int, share: float) -> list[bool]:
        """`count` flags, of which exactly `share` are set (rounded), in random places."""
        order = sorted(range(count), key=lambda _: self._shape.random())
        chosen = set(order[: round(count * share)])
        return [index in chosen for index in range(count)]


Recipe = Callable[[Draw], list[BenchRequest]]


def uniform(count: int, inputs: Span, outputs: Span, long_outputs: Span = (0, 0), long_share: float = 0.0) -> Recipe:
    """`count` requests at once, lengths uniform in the spans; a share of them has much longer outputs."""

    def make(draw: Draw) -> list[BenchRequest]:
        spans = [long_outputs if long else outputs for long in draw.marked(count, long_share)]
        return [BenchRequest(draw.tokens(draw.length(inputs)), draw.length(span)) for span in spans]

    return make


def first(recipe: Recipe, count: int, longest_output: int) -> Recipe:
    """The first `count` requests of another recipe, their outputs cut."""
    return lambda draw: [replace(r, max_tokens=min(r.max_tokens, longest_output)) for r in recipe(draw)[:count]]


def poisson(recipe: Recipe, rate: float) -> Recipe:
    """Another recipe's requests, arriving at random: `rate` a second on average, the first at 0."""

    def make(draw: Draw) -> list[BenchRequest]:
        requests = recipe(draw)
        arrivals = accumulate((draw.gap(rate) for _ in requests[1:]), initial=0.0)
        return [replace(request, arrival=time) for request, time in zip(requests, arrivals, strict=True)]

    return make


def interference(steady: int, rounds: int, every: int, prompt: int, long_prompt: int, other_outputs: int) -> Recipe:
    """`steady` requests that only decode, and, each time they have made `every` tokens, a long prompt with a short one
    right behind it. The steady ones make `every` tokens more after the last round."""

    def make(draw: Draw) -> list[BenchRequest]:
        requests = [BenchRequest(draw.tokens(prompt), every * (rounds + 1), group=STEADY) for _ in range(steady)]
        for made in range(every, every * rounds + 1, every):
            for length, group in ((long_prompt, LONG), (prompt, SHORT)):
                requests.append(BenchRequest(draw.tokens(length), other_outputs, group=group, after_tokens=made))
        return requests

    return make


def chats(
    count: int, turns: int, prefix: int, messages: Span, outputs: Span, gap: float, share: float | None = None
) -> Recipe:
    """Chats that grow, on one beginning of `prefix` tokens that is in the cache before the clock starts. A turn's
    prompt is all that its chat has said so far, and a new message.

    The first turn of a chat comes `gap` seconds after the chat before it; each further one `count * gap` seconds after
    the answer: about one prompt in `gap` seconds in all. They are evenly spaced, so that no request waits for another
    and the time to the first token is that of the prefill.

    share: only that share of each prompt is what came before (up to the end of a block), and the rest is new: as if a
    client had put a clock or a search result there. Every prompt is as long as it is without.
    """

    def make(draw: Draw) -> list[BenchRequest]:
        beginning = draw.tokens(prefix)
        requests: list[BenchRequest] = []
        common = 0
        for turn in range(turns):
            for chat in range(count):
                before = requests[-count] if turn else None
                history = before.prompt_length + before.max_tokens if before else prefix
                total = history + draw.length(messages)
                kept = history if share is None else min(history, int(share * total) // BLOCK * BLOCK)
                request = BenchRequest(draw.tokens(total - kept), draw.length(outputs))
                if turns > 1:
                    request = replace(request, group=f"turn {turn + 1}")
                if before:
                    request = replace(request, arrival=count * gap, follows=len(requests) - count, keep=kept)
                else:
                    common = max(common, kept)
                    request = replace(request, arrival=chat * gap, prompt=beginning[:kept] + request.prompt)
                requests.append(request)
        return [BenchRequest(beginning[:common], 1, warm=True), *requests] if common else requests

    return make


def warm(requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    """Those that fill the cache before the clock starts."""
    return [request for request in requests if request.warm]


def timed(requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    return [request for request in requests if not request.warm]


def total_output(requests: Sequence[BenchRequest]) -> int:
    return sum(request.max_tokens for request in requests)
