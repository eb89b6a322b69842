"""m6's tests. m7 has its cache and other weights: `on_other_weights` runs the tests there whose tokens go through
both; all of them in the deep run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common import Engine
from tests.engine_checks import BOOKKEEPING, SHARING


@pytest.fixture(params=[stage for stage in SHARING if stage in BOOKKEEPING])
def build(build: Callable[..., Engine], request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """`build("m6")` builds the stage after it where the test runs on that."""

    def make(stage: str, **options: Any) -> Engine:
        return build(request.param if stage == "m6" else stage, **options)

    return make
