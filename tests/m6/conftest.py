"""m6's tests, on every stage that has its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common import Engine
from tests.engine_checks import SHARING


@pytest.fixture(params=SHARING)
def build(build: Callable[..., Engine], request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """`build("m6")` also builds the stages after it."""

    def make(stage: str, **options: Any) -> Engine:
        return build(request.param if stage == "m6" else stage, **options)

    return make
