"""A stage that plays: `python -m stages.m1_kv_cache play`, a process that takes commands as lines of JSON on standard
input and tells what happens as lines of JSON on standard output. When its input closes, it ends.

A run's events, in order; every `t` is in seconds since the start of the run:

    prepared   what the engine has: `capacity` and `row` of its KV memory in token slots, `threads`, and the `answers`
    started
    arrived    `answers` that wait from now on
    step       `begin`, `t` (its end), `chunks` [answer, kind, tokens], `preempted`, `gained` [answer, text, tokens,
               finish reason], `kv` (what changed in the memory), `figures`
    ended      how it stands at the end; `cost`: the share of the time that went into these events
    failed     instead of any of them: `message`
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TextIO

import torch

from common.cli.generate import Build
from common.config import EngineConfig, stage_options
from common.engine import Engine
from common.errors import UserError
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from common.serving.arena.figures import Figures
from common.serving.arena.memory_map import MemoryMap
from common.serving.arena.presets import Ask
from common.trace import StepTrace

IDLE_SLEEP = 0.002
WARMUP_TOKENS = 4
Tell = Callable[[dict[str, Any]], None]


def answers_of(asks: Sequence[Ask]) -> list[tuple[int, int]]:
    """(number of the ask, sample) of each answer: events speak of answers by their place in this list."""
    return [(number, sample) for number, ask in enumerate(asks) for sample in range(ask.n)]


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
    """One race of one engine."""

    def __init__(self, engine: Engine, asks: Sequence[Ask], salt: str, tell: Tell, stop: threading.Event) -> None:
        self._engine, self._asks, self._tell, self._stop = engine, asks, tell, stop
        self._name = salt
        self._salt: dict[str, Any] = {"cache_salt": salt} if _takes_salt(engine) else {}
        self._prompts = [encode(engine, ask) for ask in asks]
        answers = answers_of(asks)
        # the engine's id of each answer; the samples of a prompt have its id and their number
        ids = [f"{salt}-{number}" + (f"#{sample}" if sample else "") for number, sample in answers]
        self._answer = {id: index for index, id in enumerate(ids)}
        self._text = [0] * len(ids)
        self._tokens = [0] * len(ids)
        self._done = [False] * len(ids)
        self._first = [answers.index((number, 0)) for number in range(len(asks))]
        self._figures = Figures(len(ids))
        self._map = MemoryMap(self._answer)
        self._seen = -1  # index of the last step that was told
        self._start = 0.0
        self._cost = 0.0

    def prepared(self, threads: int) -> None:
        engine = self._engine
        usage = engine.scheduler.cache.usage()
        blocks = getattr(engine.scheduler.cache, "block_size", None)
        self._tell(
            {
                "event": "prepared",
                "model": engine.config.model,
                "dtype": str(engine.config.torch_dtype).removeprefix("torch."),
                "threads": threads,
                "capacity": usage.capacity,
                "row": blocks or getattr(engine.scheduler.cache, "row_length", None) or engine.max_model_len,
                "paged": blocks is not None,
                "answers": [
                    {
                        "title": self._asks[number].title + (f" ({sample + 1})" if self._asks[number].n > 1 else ""),
                        "prompt_tokens": len(self._prompts[number]),
                        "max_tokens": self._asks[number].max_tokens,
                    }
                    for number, sample in answers_of(self._asks)
                ],
            }
        )

    def play(self) -> None:
        """From the first request to the last token, or to `stop`."""
        engine = self._engine
        engine.trace = StepTrace(max_steps=8, regions=True)
        waiting = list(range(len(self._asks)))
        self._start = time.perf_counter()
        self._tell({"event": "started"})
        while (waiting or engine.has_unfinished) and not self._stop.is_set():
            waiting = [number for number in waiting if not self._arrives(number)]
            if engine.has_unfinished:
                self._report(engine.step())
            else:
                time.sleep(IDLE_SLEEP)
        stopped = self._stop.is_set()
        end = self._now()
        for number in range(len(self._asks)):
            engine.abort(self._id(number))
        while engine.has_unfinished:
            engine.step()
        self._tell(
            {
                "event": "ended",
                "t": round(end, 4),
                "stopped": stopped,
                "kv": self._map.changes(engine.scheduler.cache.regions()),
                "figures": self._figures.at_the_end(end),
                "cost": round((self._cost + engine.trace.cost) / end, 4),
            }
        )
        engine.trace = None

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _id(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _arrives(self, number: int) -> bool:
        """Hand a prompt to the engine if its time has come. One that fell due during a step has waited since then."""
        ask, now = self._asks[number], self._now()
        due = ask.after
        if ask.after_tokens is not None:
            if self._tokens[0] < ask.after_tokens and not self._done[0]:
                return False
            due = now
        if due > now:
            return False
        seeded = SamplingParams(max_tokens=ask.max_tokens, n=ask.n, temperature=0.8 if ask.n > 1 else 0.0, seed=number)
        self._engine.add_request(
            self._prompts[number], seeded, request_id=self._id(number), arrival_time=self._start + due, **self._salt
        )
        answers = [self._first[number] + sample for sample in range(ask.n)]
        self._figures.arrivals.update(dict.fromkeys(answers, due))
        self._tell({"event": "arrived", "t": round(due, 4), "answers": answers})
        return True

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
        self._tell(
            {
                "event": "step",
                "begin": round(record.begin - self._start, 4),
                "t": round(end, 4),
                "chunks": [[self._answer[c.request_id], c.kind, c.length] for c in record.chunks],
                "preempted": [self._answer[id] for id in record.preempted],
                "gained": gained,
                "waiting": record.waiting,
                "running": record.running,
                "reserved": record.kv_reserved,
                "stored": record.kv_stored,
                "kv": self._map.changes(record.regions or ()),
                "figures": self._figures.now(),
            }
        )
        self._cost += time.perf_counter() - began

    def _gained(self, output: RequestOutput) -> list[tuple[int, str, int, str | None]]:
        """What the answers of one prompt have gained since the last step."""
        gained: list[tuple[int, str, int, str | None]] = []
        for sample in output.outputs:
            answer = self._answer[output.request_id] + sample.index
            if self._done[answer]:
                continue
            text = sample.text if self._engine.tokenizer else "".join(f"{token} " for token in sample.token_ids)
            count = len(sample.token_ids)
            if count > self._tokens[answer] or sample.finish_reason:
                gained.append((answer, text[self._text[answer] :], count - self._tokens[answer], sample.finish_reason))
            self._text[answer], self._tokens[answer] = len(text), count
            self._done[answer] = sample.finish_reason is not None
        return gained


class Player:
    """Keeps the engine of the last run, for the next one with the same options."""

    def __init__(self, build: Build, number: int, config: EngineConfig, tell: Tell) -> None:
        self._build, self._number, self._config, self._tell = build, number, config, tell
        self._engine: Engine | None = None
        self._built: tuple[Any, ...] = ()
        self._run: Run | None = None
        self._races = 0
        self.stop = threading.Event()

    def prepare(self, command: dict[str, Any]) -> None:
        asks = [Ask(**ask) for ask in command["asks"]]
        self.stop.clear()
        engine = self._engine_for(command["limits"], command["threads"])
        self._warm_up(engine, asks)
        use_threads(command["threads"])  # numba's first parallel kernel has taken all cores, for PyTorch too
        self._races += 1
        self._run = Run(engine, asks, f"race{self._races}", self._tell, self.stop)
        self._run.prepared(torch.get_num_threads())

    def play(self) -> None:
        assert self._run is not None, "prepare first"
        self._run.play()

    def _engine_for(self, limits: dict[str, Any], threads: int) -> Engine:
        """Some kernels take the number of threads when they are built: another number is another engine."""
        wanted = (threads, *sorted(limits.items()))
        if self._engine is not None and wanted == self._built:
            return self._engine
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        use_threads(threads)
        base = self._config
        model = open_source(base.model, base.torch_device, progress=None).config
        options = {**limits, "max_model_len": min(limits["max_model_len"], model.max_position_embeddings)}
        options["kv_cache_memory"] = options.pop("kv_tokens") * kv_bytes_per_token(model, base.torch_dtype)
        given = {name: getattr(base, name) for name in base.__dataclass_fields__}
        self._engine = self._build(EngineConfig(**{**given, **stage_options(self._number, options)}))
        self._built = wanted
        return self._engine

    def _warm_up(self, engine: Engine, asks: Sequence[Ask]) -> None:
        """First steps are slow: libraries choose their kernels in them. Prompts of the same lengths as those that come,
        and nothing like them, so that no prefix cache knows them."""
        vocab = engine.runner.model.config.vocab_size
        lengths = [len(encode(engine, ask)) for ask in asks]
        prompts = [[(7 * i + 31 * number + 1) % vocab for i in range(length)] for number, length in enumerate(lengths)]
        tokens = [min(WARMUP_TOKENS, ask.max_tokens) for ask in asks]
        engine.generate(prompts, [SamplingParams(max_tokens=count, ignore_eos=True) for count in tokens])
        engine.reset_metrics()


def use_threads(count: int) -> None:
    """PyTorch's threads, and those of numba's kernels where a stage has any."""
    torch.set_num_threads(count)
    if "numba" in sys.modules:
        import numba

        most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        numba.set_num_threads(min(count, most))


def _takes_salt(engine: Engine) -> bool:
    """A stage with a prefix cache: every race starts with nothing that an earlier one left behind."""
    return "cache_salt" in inspect.signature(engine.add_request).parameters


def play(build: Build, number: int, config: EngineConfig) -> None:
    """The whole of the process."""
    out = _own_output()

    def tell(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")
        out.flush()

    player = Player(build, number, config, tell)
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, player.stop), daemon=True).start()
    while True:
        command = commands.get()
        try:
            if command["do"] == "prepare":
                player.prepare(command)
            else:
                player.play()
        except UserError as error:
            tell({"event": "failed", "message": str(error)})
        except Exception as error:
            import traceback

            traceback.print_exc()
            tell({"event": "failed", "message": f"{type(error).__name__}: {error}"})


def _listen(commands: queue.SimpleQueue[dict[str, Any]], stop: threading.Event) -> None:
    """`stop` takes effect at once; the rest waits for its turn. A closed input means that the parent is gone."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            stop.set()
        else:
            commands.put(command)
    os._exit(0)


def _own_output() -> TextIO:
    """Standard output, for events alone: what libraries print goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def command_line(do: str, **what: Any) -> str:
    return json.dumps({"do": do, **what}) + "\n"


def prepare_line(asks: Sequence[Ask], limits: dict[str, Any], threads: int) -> str:
    return command_line("prepare", asks=[asdict(ask) for ask in asks], limits=limits, threads=threads)
