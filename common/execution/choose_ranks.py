"""Whether an engine is built in this process alone, or on several ranks."""

from collections.abc import Callable
from typing import TypeVar

from common.config import EngineConfig

Engine = TypeVar("Engine")


def on_ranks(build: Callable[[EngineConfig], Engine]) -> Callable[[EngineConfig], Engine]:
    """The stage's way to build its engine, on as many ranks as `tensor_parallel_size` says; with one of them, as it is:
    nothing of PyTorch's distributed library is touched then."""

    def build_all(config: EngineConfig) -> Engine:
        if config.tensor_parallel_size == 1:
            return build(config)
        from common.execution.parallel.start import build_on_ranks

        return build_on_ranks(build, config)  # pyright: ignore

    return build_all
