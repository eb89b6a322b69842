"""A Ray to run on, and how an engine gets there."""

# pyright: reportMissingImports=false
import contextlib
import importlib
import logging
import os
from collections.abc import Generator
from dataclasses import fields
from typing import Any

import ray

from common.config import EngineConfig
from common.engine import Build
from common.execution.threads import usable_cpus
from common.models.load import open_source


@contextlib.contextmanager
def cluster(engines: int, config: EngineConfig) -> Generator[tuple[float, int]]:
    """The cluster that RAY_ADDRESS names, or one of this machine alone, until the end of the block. Yields what one of
    so many engines may take: CPUs, and GPUs."""
    open_source(config.model, config.torch_device, progress=None)  # downloads or converts once, not in each engine
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # Ray's own logs are under /tmp/ray
    address, cpus = os.environ.get("RAY_ADDRESS"), usable_cpus()
    local: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    gpus = int(config.torch_device.type == "cuda")
    ray.init(address or "local", logging_level=logging.WARNING, **local)
    try:
        yield 1 if gpus or address else cpus // engines or cpus / engines, gpus
    finally:
        ray.shutdown()


def portable(config: EngineConfig) -> dict[str, Any]:
    """Its options, for another process: a GPU is the one that Ray shows it."""
    return {f.name: getattr(config, f.name) for f in fields(config)} | {"device": config.torch_device.type}


def builder(build: str) -> Build:
    """Of `stages.m6_prefix_caching.engine:build`, which any process can import."""
    module, _, name = build.partition(":")
    return getattr(importlib.import_module(module), name)
