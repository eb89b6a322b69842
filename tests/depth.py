"""How far the searches go: some cases in `make test`, many in `make test-all`, which sets FOLOVLLM_DEEP."""

from __future__ import annotations

import os

DEEP = os.environ.get("FOLOVLLM_DEEP") == "1"


def by_depth(quick: int, deep: int) -> int:
    """The number of examples, seeds or requests."""
    return deep if DEEP else quick
