"""A batch over a cluster, by Ray Data: parts of the file of requests go to engines, each of which is an actor."""

# pyright: reportMissingImports=false
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.data

from common.cli.batch import Answers
from common.cli.generate import loaded_engine
from common.config import EngineConfig
from common.engine import Build
from common.scale.serve import cluster, portable, share
from common.serving.batch import Answerer, read_lines

PART = 1 << 16  # bytes of the file
AT_ONCE = 4  # parts that an engine answers at the same time: the last lines of one do not wait alone


class Actor:
    """An engine, and the parts that it is given. `source`: the file of requests."""

    def __init__(self, build: Build, options: dict[str, Any], name: str | None, source: Path) -> None:
        self._source, self._loaded = source, loaded_engine(build, EngineConfig(**options))
        self._answer = Answerer(self._loaded.__enter__(), name)

    async def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """`part`: where it `begin`s and `end`s in the file."""
        with self._source.open("rb") as file:
            lines = read_lines(file, part["begin"], part["end"])
            return {"answers": b"".join([line async for line in self._answer.all(lines)])}


def answers_of(build: Build, config: EngineConfig, served_name: str | None) -> Answers:
    """By an engine on each GPU, or on each machine; all of these can read the file."""

    def answers(source: Path, start: int) -> Iterator[bytes]:
        with cluster(config):
            number = int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes())
            context = ray.data.DataContext.get_current()
            context.execution_options.preserve_order, context.enable_progress_bars = True, False
            size = source.stat().st_size
            parts = [{"begin": place, "end": min(place + PART, size)} for place in range(start, size, PART)]
            rows = ray.data.from_items(parts, override_num_blocks=-(-len(parts) // AT_ONCE))
            options: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=number), **share(number, config)}
            options["fn_constructor_args"] = build, portable(config), served_name, source.absolute()
            for row in rows.map(Actor, **options).iter_rows():  # pyright: ignore[reportArgumentType]
                yield row["answers"]

    return answers
