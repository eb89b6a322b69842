"""A batch over a cluster, by Ray Data: parts of the file of requests go to engines, each of which is an actor."""

# pyright: reportMissingImports=false
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray.data

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.engine import Build
from common.execution.cores import in_own_thread
from common.scale.serve import cluster, portable
from common.serving.batch import Answerer, read_lines

PART = 1 << 16  # bytes of the file
AT_ONCE = 4  # parts that an engine answers at the same time: the last lines of one do not wait alone


class Answers:
    """An engine in an actor."""

    def __init__(self, build: Build, options: dict[str, Any], name: str | None, source: Path) -> None:
        self._source, self._stack, config = source, ExitStack(), EngineConfig(**options)
        engine = in_own_thread(lambda: self._stack.enter_context(ready_engine(build, config)))
        self._answer = Answerer(engine, name)

    async def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """`part`: where it `begin`s and `end`s in the file."""
        with self._source.open("rb") as file:
            lines = read_lines(file, part["begin"], part["end"])
            return {"answers": b"".join([line async for line in self._answer.all(lines)])}


def answers(
    build: Build, config: EngineConfig, name: str | None, engines: int, source: Path, start: int
) -> Iterator[bytes]:
    """The answers from a place on, of a file that every machine of the cluster can read, in order."""
    with cluster(engines, config) as (cpus, gpus):
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        size = source.stat().st_size
        parts = [{"begin": place, "end": min(place + PART, size)} for place in range(start, size, PART)]
        rows = ray.data.from_items(parts, override_num_blocks=-(-len(parts) // AT_ONCE))
        given = build, portable(config), name, source
        pool = ray.data.ActorPoolStrategy(size=engines)
        options: dict[str, Any] = {"fn_constructor_args": given, "compute": pool, "num_cpus": cpus, "num_gpus": gpus}
        for row in rows.map(Answers, **options).iter_rows():  # pyright: ignore[reportArgumentType]
            yield row["answers"]
