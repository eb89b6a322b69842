"""A stage that plays: `python -m stages.m1_kv_cache play`, a process that takes commands as lines of JSON on standard
input and writes events as lines of JSON to standard output. It ends when its input closes.

A run's events, in order; every `t` is in seconds since the start of the run:

    loading    before that: `text`, and `done` of `total` where that is known
    prepared   `capacity` and `row` of the KV memory in token slots, `threads`, and the `answers`
    started
    arrived    `answers` that wait from now on
    step       `begin`, `t` (its end), `chunks` [answer, kind, tokens], `preempted`, `gained` [answer, text, tokens,
               finish reason], `kv` (changes in the memory), `figures`
    ended      the final state; `cost`: the share of the time that went into these events
    failed     instead of any of them: `message`
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TextIO

import torch

from common.arena.presets import Ask
from common.arena.run import Run, Tell, encode
from common.config import EngineConfig, stage_options
from common.engine import Engine
from common.errors import UserError
from common.execution.cores import use_threads
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.sampling_params import SamplingParams
from common.watch.progress import listening

WARMUP_TOKENS = 4
LOADING_PAUSE = 0.3  # seconds between two `loading` events


class Player:
    """Keeps the engine of the last run, for the next one with the same options."""

    def __init__(self, build: Callable[[EngineConfig], Engine], number: int, config: EngineConfig, tell: Tell) -> None:
        self._build, self._number, self._config, self._tell = build, number, config, tell
        self._engine: Engine | None = None
        self._built: tuple[Any, ...] = ()
        self._run: Run | None = None
        self._races = 0
        self._last_word = 0.0
        self.stop = threading.Event()

    def prepare(self, command: dict[str, Any]) -> None:
        asks = [Ask(**ask) for ask in command["asks"]]
        self.stop.clear()
        self._run = None
        with listening(self._progress):
            engine = self._engine_for(command["limits"], command["threads"])
        self._races += 1
        run = Run(engine, asks, f"race{self._races}", self._tell, self.stop)
        run.check()
        self._warm_up(engine, asks)
        use_threads(command["threads"])  # numba's first parallel kernel has taken all cores, for PyTorch too
        run.prepared(torch.get_num_threads())
        self._run = run

    def play(self) -> None:
        assert self._run is not None, "prepare first"
        self._run.play()

    def drop(self) -> None:
        """After a failure the engine's state is unknown: the next race builds another one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _progress(self, text: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if not total or now - self._last_word >= LOADING_PAUSE:  # a line has no total, and is always told
            self._last_word = now
            self._tell({"event": "loading", "text": text, "done": done, "total": total})

    def _engine_for(self, limits: dict[str, Any], threads: int) -> Engine:
        """Some kernels take the number of threads when they are built: another number is another engine."""
        wanted = (threads, *sorted(limits.items()))
        if self._engine is not None and wanted == self._built:
            return self._engine
        self.drop()
        self._tell({"event": "loading", "text": "building its engine"})
        use_threads(threads)
        base = self._config
        model = open_source(base.model, base.torch_device, progress=None).config
        options = {**limits, "max_model_len": min(limits["max_model_len"], model.max_position_embeddings)}
        options["kv_cache_memory"] = options.pop("kv_tokens") * kv_bytes_per_token(model, base.torch_dtype)
        self._engine = self._build(replace(base, **stage_options(self._number, options)))
        self._built = wanted
        return self._engine

    def _warm_up(self, engine: Engine, asks: Sequence[Ask]) -> None:
        """First steps are slow: libraries choose their kernels in them. The prompts have the lengths of the race's, but
        other tokens, so that no prefix cache finds them."""
        vocab = engine.runner.model.config.vocab_size
        lengths = [len(encode(engine, ask)) for ask in asks]
        prompts = [[(7 * i + 31 * number + 1) % vocab for i in range(length)] for number, length in enumerate(lengths)]
        tokens = [min(WARMUP_TOKENS, ask.max_tokens) for ask in asks]
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in tokens]
        self._tell({"event": "loading", "text": "warming up", "done": 0, "total": sum(tokens)})
        for done, _ in enumerate(engine.stream(prompts, params), start=1):
            self._progress("warming up", done, sum(tokens))
        engine.reset_metrics()


def play(build: Callable[[EngineConfig], Engine], number: int, config: EngineConfig) -> None:
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
            traceback.print_exc()
            player.drop()
            tell({"event": "failed", "message": f"{type(error).__name__}: {error}"})


def _listen(commands: queue.SimpleQueue[dict[str, Any]], stop: threading.Event) -> None:
    """`stop` takes effect at once; other commands are queued. A closed input means that the parent has ended."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            stop.set()
        else:
            commands.put(command)
    os._exit(0)


def _own_output() -> TextIO:
    """Standard output, for events alone; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def prepare_command(asks: Sequence[Ask], limits: dict[str, Any], threads: int) -> dict[str, Any]:
    return {"do": "prepare", "asks": [asdict(ask) for ask in asks], "limits": limits, "threads": threads}
