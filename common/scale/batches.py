"""A batch over a cluster, by Ray Data: parts of the file of requests go to engines, each of which is an actor."""

# pyright: reportMissingImports=false
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ray.data

from common.cli.batch import Answerer
from common.config import EngineConfig
from common.engine import Build
from common.scale.serve import cluster, portable, share

PART = 1 << 18  # bytes of the file


class Actor:
    """An engine of the cluster."""

    def __init__(self, build: Build, options: dict[str, Any], served_name: str | None, source: Path) -> None:
        self._answerer, self._source = Answerer(build, EngineConfig(**options), served_name), source

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """part: where in the file it `begin`s and `end`s."""
        return {"answers": b"".join(self._answerer.answers(self._source, part["begin"], part["end"]))}


def answers(build: Build, config: EngineConfig, served_name: str | None, source: Path, start: int) -> Generator[bytes]:
    """By an engine on each GPU, or on each machine; all of these can read the file."""
    with cluster(config):
        number, resources = share(None, config)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        size = source.stat().st_size
        parts = [{"begin": place, "end": min(place + PART, size)} for place in range(start, size, PART)]
        rows = ray.data.from_items(parts, override_num_blocks=len(parts))
        options: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=number), **resources}
        options["fn_constructor_args"] = build, portable(config), served_name, source
        for row in rows.map(Actor, **options).iter_rows():  # pyright: ignore[reportArgumentType]
            yield row["answers"]
