"""What the tests of m6 share."""

from __future__ import annotations

from functools import cache

import pytest

from common import Engine
from tests.engine_checks import SHARING, exactly
from tests.helpers import greedy
from tests.integrity import check_integrity

INDICES = ("hash", "radix")
on_other_weights = pytest.mark.parametrize("build", SHARING, indirect=True)
"""On m7 too, whose weights have 4 bits."""

_known: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}


def alone(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, with the whole sequence computed again for each token."""
    key = (engine.stage, str(engine.config.model), tuple(prompt))
    if len(_known.get(key, ())) < count:
        _known[key] = greedy(engine.runner.model, prompt, count)
    return _known[key][:count]


def ask(engine: Engine, prompt: list[int], count: int = 3, cache_salt: str | None = None) -> int:
    """Serve one prompt, check its tokens; returns how many of the prompt's were cached."""
    id = engine.add_request(prompt, exactly(count), cache_salt=cache_salt)
    final = None
    while engine.has_unfinished:
        [final] = [output for output in engine.step() if output.request_id == id]
        check_integrity(engine.scheduler.cache)
    assert final is not None and final.finished and final.token_ids == alone(engine, prompt, count)
    return final.num_cached_tokens


@cache
def words(first: int, count: int) -> list[int]:
    """Different tokens; what begins differently has none in common up to 100 tokens."""
    return [1 + (100 * first + i) % 511 for i in range(count)]
