"""Sides without an engine, and an arena of them in this process: the page's tests say what happens when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from common.arena.app import server_of
from common.arena.figures import Figures
from common.arena.side import Event, Side
from common.serving.listener import address, listen
from common.serving.options import ServerOptions

WORDS = "The lamp turned over the water while the keeper wrote down every ship that passed in the long night. "


class Actor(Side):
    """Answers `prepare` and `play` as a stage with a paged cache would, in `steps` steps of 2 ms.

    fails: the commands that fail, with what they say. loads: `prepare` goes on until `stop`, with `done` of 30 done.
    """

    def __init__(self, stage: str, title: str = "", steps: int = 24) -> None:
        self.stage, self.number, self.title = stage, int(stage[1:]), title or f"{stage} paged kv"
        self.steps = steps
        self.fails: dict[str, str] = {}
        self.loads = False
        self.done = 3
        self.stopped = threading.Event()
        self._asks: list[dict[str, Any]] = []

    def do(self, command: Event) -> Iterator[Event]:
        self.stopped.clear()
        if command["do"] in self.fails:
            yield {"event": "failed", "message": self.fails[command["do"]]}
        elif command["do"] == "play":
            yield from self._play()
        else:
            yield {"event": "loading", "text": "making its 4-bit weights", "done": self.done, "total": 30}
            if self.loads:
                self.stopped.wait(30)
                yield {"event": "failed", "message": "its process has ended"}
                return
            self._asks = command["asks"]
            yield self._prepared(command["limits"]["kv_tokens"])

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.stop()

    def _prepared(self, capacity: int) -> Event:
        samples = [ask["title"] for ask in self._asks for _ in range(ask["n"])]
        answers = [{"title": title, "prompt_tokens": 40, "max_tokens": 96} for title in samples]
        self._count = len(answers)
        about = {"model": "smollm2-135m-instruct", "dtype": "bfloat16", "threads": 2}
        return {"event": "prepared", **about, "capacity": capacity, "row": 16, "answers": answers}

    def _play(self) -> Iterator[Event]:
        """Every answer writes in every step, into a block of its own."""
        everybody = range(self._count)
        figures = Figures(self._count)
        yield {"event": "started"}
        yield {"event": "arrived", "t": 0.0, "answers": list(everybody)}
        now = 0.0
        for step in range(self.steps):
            if self.stopped.is_set():
                break
            time.sleep(0.002)
            begin, now = now, now + 0.2  # a recording of some seconds
            last = step == self.steps - 1
            figures.step(now, [(answer, 4) for answer in everybody], 0, self._count, 16 * self._count)
            blocks = [[16 * answer, 16, min(16, step + 1), [answer]] for answer in everybody]
            yield {
                "event": "step", "begin": begin, "t": now, "preempted": [], "figures": figures.now(),
                "chunks": [[answer, "decode" if step else "prefill", 1] for answer in everybody],
                "gained": [[answer, WORDS[:50], 4, "length" if last else None] for answer in everybody],
                "kv": {"set": blocks, "free": []},
            }  # fmt: skip
        yield {"event": "ended", "t": now, "stopped": self.stopped.is_set(), "cost": 0.012,
               "kv": {"set": [], "free": [16 * answer for answer in everybody]},
               "figures": figures.at_the_end(now or 1.0)}  # fmt: skip


class Stage:
    """An arena of these actors on a free port, or on that one; `close()` ends it."""

    def __init__(self, actors: Sequence[Actor], port: int = 0) -> None:
        listener = listen(ServerOptions(port=port))
        self.url = address(listener)
        self.port = listener.getsockname()[1]
        self._server = server_of(actors)
        self._actors = actors
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        for actor in self._actors:
            actor.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


def on_stage(*actors: Actor, port: int = 0) -> closing[Stage]:
    return closing(Stage(actors, port))
