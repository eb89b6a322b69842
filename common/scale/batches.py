"""A batch over a cluster, by Ray Data: parts of the file of requests go to engines, each of which is an actor."""

# pyright: reportMissingImports=false
import asyncio
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.data

from common.cli.batch import read_lines
from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.execution.cores import in_own_thread
from common.scale.cluster import builder, cluster, portable
from common.serving.batch import AHEAD, answering, in_order

PARTS = 2  # that an engine has at a time: the next one begins while the last answers of one are awaited


class Answers:
    """An engine in an actor. Ray Data calls it in several threads."""

    def __init__(self, build: str, options: Mapping[str, Any], served_name: str | None, source: Path) -> None:
        make, config = builder(build), EngineConfig(**options)
        self._source, self._stack = source, ExitStack()
        self._engine = in_own_thread(lambda: self._stack.enter_context(ready_engine(make, config)))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._answer = self._on_loop(answering(self._engine, served_name).__aenter__())

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """`part`: where it `begin`s and `end`s in the file. Returns its `answers`, as bytes."""
        with self._source.open("rb") as file:
            file.seek(part["begin"])
            lines = read_lines(io.BytesIO(file.read(part["end"] - part["begin"])))
        return {"answers": self._on_loop(self._all(lines))}

    async def _all(self, lines: Iterator[bytes]) -> bytes:
        ahead = AHEAD * self._engine.scheduler.max_num_seqs
        return b"".join([line async for line in in_order(lines, self._answer, ahead)])


def answers(
    build: str, config: EngineConfig, served_name: str | None, engines: int, source: Path,
    parts: Sequence[tuple[int, int]],
) -> Iterator[bytes]:  # fmt: skip
    """The answers to all parts of a file that every machine of the cluster can read, in order."""
    with cluster(engines, config) as (cpus, gpus):
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        rows = ray.data.from_items(
            [{"begin": begin, "end": end} for begin, end in parts], override_num_blocks=len(parts)
        )
        answered = rows.map(
            Answers,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(build, portable(config), served_name, source),
            compute=ray.data.ActorPoolStrategy(size=engines, max_tasks_in_flight_per_actor=PARTS),
            max_concurrency=PARTS,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in answered.iter_rows():
            yield from io.BytesIO(row["answers"])
