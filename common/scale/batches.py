"""A batch over a cluster, by Ray Data: parts of the file of requests go to engines, each of which is an actor."""

# pyright: reportMissingImports=false
import logging
import re
from collections.abc import Generator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import ray.data
from ray.exceptions import RayError

from common.cli.batch import Answerer
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError, one_line
from common.scale.serve import cluster, share

SMALLEST, MOST = 1 << 18, 4096  # bytes of a part of the file, and number of parts


class Actor:
    """Loads at its first part: one that cannot be made would be made again for ever."""

    def __init__(self, *given: Any) -> None:
        self._load = cache(partial(Answerer, *given))

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"answers": b"".join(self._load().answers(Path(part["source"]), part["begin"], part["end"]))}


def answers(build: Build, config: EngineConfig, served_name: str | None, source: Path, start: int) -> Generator[bytes]:
    """By an engine on each GPU, or on each machine; all of these can read the file."""
    with cluster(config):
        number, resources = share(None, config)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        size = source.stat().st_size
        step = max(SMALLEST, (size - start) // MOST)
        parts = [{"source": str(source), "begin": place, "end": place + step} for place in range(start, size, step)]
        rows = ray.data.from_items(parts, override_num_blocks=len(parts))
        options: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=number), **resources}
        options["fn_constructor_args"] = build, replace(config, device=config.torch_device.type), served_name
        try:
            for row in rows.map(Actor, **options).iter_rows():  # pyright: ignore[reportArgumentType]
                yield row["answers"]
        except RayError as error:
            raise UserError((re.findall("UserError: (.*)", str(error)) or [one_line(error)])[-1]) from None
