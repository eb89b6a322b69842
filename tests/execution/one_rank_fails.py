"""A stage that only rank 1 refuses to build, after rank 0 has."""

from common import Engine, EngineConfig, UserError
from stages.m6_prefix_caching import engine


def build(config: EngineConfig) -> Engine:
    if config.ranks is not None and config.ranks.rank == 1:
        raise UserError("no memory here: free some")
    return engine.build(config)
