"""One race of one engine, as events."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from common.arena.figures import Figures
from common.arena.presets import Ask
from common.engine import Engine
from common.kv_cache import PrefixCache
from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from common.watch.kv_memory import Region
from common.watch.trace import StepTrace

IDLE_SLEEP = 0.002
Tell = Callable[[dict[str, Any]], None]


def encode(engine: Engine, ask: Ask) -> list[int]:
    """A model without a tokenizer gets the bytes of the text as token ids."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        text = ask.system + ask.prompt
        return [byte % engine.runner.model.config.vocab_size for byte in text.encode()]
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"{ask.system}\n{ask.prompt}".strip())
    return tokenizer.chat(ask.messages())


class Run:
    """One race of one engine. `name`: also its cache salt, so that nothing of an earlier race is found."""

    def __init__(self, engine: Engine, asks: Sequence[Ask], name: str, tell: Tell, stop: threading.Event) -> None:
        self._engine, self._asks, self._name, self._tell, self._stop = engine, asks, name, tell, stop
        self._prompts = [encode(engine, ask) for ask in asks]
        # (ask, sample) of each answer: events number the answers by their place in this list
        self._answers = [(number, sample) for number, ask in enumerate(asks) for sample in range(ask.n)]
        # the engine's id of each answer; the samples of a prompt have its id and their number
        ids = [f"{name}-{number}" + (f"#{sample}" if sample else "") for number, sample in self._answers]
        self._answer = {id: index for index, id in enumerate(ids)}
        self._text = [0] * len(ids)
        self._tokens = [0] * len(ids)
        self._done = [False] * len(ids)
        self._figures = Figures(len(ids))
        self._told: dict[int, tuple[int, int, tuple[int, ...]]] = {}  # the regions of the KV memory, by their starts
        self._seen = -1  # index of the last step that was reported
        self._start = 0.0
        self._cost = 0.0

    def prepared(self, threads: int) -> None:
        engine, cache = self._engine, self._engine.scheduler.cache
        event: dict[str, Any] = {
            "event": "prepared",
            "model": engine.config.model,
            "dtype": str(engine.config.torch_dtype).removeprefix("torch."),
            "threads": threads,
            "capacity": cache.usage().capacity,
            "row": getattr(cache, "block_size", 0) or getattr(cache, "row_length", 0) or engine.max_model_len,
            "answers": [
                {
                    "title": self._asks[number].title + (f" ({sample + 1})" if self._asks[number].n > 1 else ""),
                    "prompt_tokens": len(self._prompts[number]),
                    "max_tokens": self._asks[number].max_tokens,
                }
                for number, sample in self._answers
            ],
        }
        self._tell(event)

    def check(self) -> None:
        """Give every prompt to the engine once and abort it: one that cannot run raises `UserError` here already."""
        try:
            for number in range(len(self._asks)):
                self._add(number, time.perf_counter())
        finally:
            self._clear()

    def play(self) -> None:
        """From the first request to the last token, or to `stop`. Leaves nothing in the engine, also after an error."""
        engine = self._engine
        engine.reset_prefix_cache()  # of the warm-up, and of races before
        trace = engine.trace = StepTrace(max_steps=8, regions=True)
        waiting = list(range(len(self._asks)))
        self._start = time.perf_counter()
        self._tell({"event": "started"})
        try:
            while (waiting or engine.has_unfinished) and not self._stop.is_set():
                waiting = [number for number in waiting if not self._arrives(number)]
                if engine.has_unfinished:
                    self._report(engine.step())
                else:
                    time.sleep(IDLE_SLEEP)
            stopped, end = self._stop.is_set(), self._now()
        finally:
            self._clear()
            engine.trace = None
        event: dict[str, Any] = {
            "event": "ended",
            "t": round(end, 4),
            "stopped": stopped,
            "kv": self._changes(engine.scheduler.cache.regions()),
            "figures": self._figures.at_the_end(end),
            "cost": round((self._cost + trace.cost) / end, 4),
        }
        self._tell(event)

    def _changes(self, held: Iterable[Region]) -> dict[str, Any]:
        """What a picture of the KV memory has to redraw: `set` lists [start, length, stored, owners] of new and changed
        regions, `free` the starts of those that are gone. In token slots. What a prefix cache keeps has no owners."""
        cache = self._engine.scheduler.cache
        kept = cache.kept_regions() if isinstance(cache, PrefixCache) else []
        now = {  # a kept region that a request holds again counts as held
            region.start: (region.length, region.stored, tuple(self._answer.get(id, -1) for id in region.owners))
            for region in (*kept, *held)
        }
        changed = [[start, *what] for start, what in now.items() if self._told.get(start) != what]
        gone = [start for start in self._told if start not in now]
        self._told = now
        return {"set": changed, "free": gone}

    def _clear(self) -> None:
        for number in range(len(self._asks)):
            self._engine.abort(f"{self._name}-{number}")
        while self._engine.has_unfinished:
            self._engine.step()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _arrives(self, number: int) -> bool:
        """Give a prompt to the engine if it is due. One that fell due during a step has waited since then."""
        ask, now = self._asks[number], self._now()
        due = ask.after
        if ask.after_tokens is not None:
            if self._tokens[0] < ask.after_tokens and not self._done[0]:
                return False
            due = now
        if due > now:
            return False
        self._add(number, self._start + due)
        answers = [answer for answer, (asked, _) in enumerate(self._answers) if asked == number]
        self._figures.arrivals.update(dict.fromkeys(answers, due))
        self._tell({"event": "arrived", "t": round(due, 4), "answers": answers})
        return True

    def _add(self, number: int, arrival: float) -> None:
        ask = self._asks[number]
        seeded = SamplingParams(max_tokens=ask.max_tokens, n=ask.n, temperature=0.8 if ask.n > 1 else 0.0, seed=number)
        name, salt = f"{self._name}-{number}", self._name
        self._engine.add_request(self._prompts[number], seeded, request_id=name, arrival_time=arrival, cache_salt=salt)

    def _report(self, outputs: Sequence[RequestOutput]) -> None:
        trace = self._engine.trace
        assert trace is not None
        if not trace.steps or trace.steps[-1].index == self._seen:
            return
        began = time.perf_counter()
        record = trace.steps[-1]
        self._seen = record.index
        end = record.begin + record.duration - self._start
        gained = [one for output in outputs for one in self._gained(output)]
        ended = sum(reason is not None for *_, reason in gained)
        self._figures.step(end, [(a, n) for a, _, n, _ in gained if n], ended, record.running, record.kv_reserved)
        event: dict[str, Any] = {
            "event": "step",
            "begin": round(record.begin - self._start, 4),
            "t": round(end, 4),
            "chunks": [[self._answer[c.request_id], c.kind, c.length] for c in record.chunks],
            "preempted": [self._answer[id] for id in record.preempted],
            "gained": gained,
            "reserved": record.kv_reserved,
            "kv": self._changes(record.regions or ()),
            "figures": self._figures.now(),
        }
        self._tell(event)
        self._cost += time.perf_counter() - began

    def _gained(self, output: RequestOutput) -> Iterator[tuple[int, str, int, str | None]]:
        """What the answers of one prompt have gained since the last step."""
        for sample in output.outputs:
            answer = self._answer[output.request_id] + sample.index
            if self._done[answer]:
                continue
            text, count = sample.readable, len(sample.token_ids)
            if count > self._tokens[answer] or sample.finish_reason:
                yield answer, text[self._text[answer] :], count - self._tokens[answer], sample.finish_reason
            self._text[answer], self._tokens[answer] = len(text), count
            self._done[answer] = sample.finish_reason is not None
