"""Real clients against servers that run already. `make clients` installs the clients in environments of their own,
without this project's libraries, and names the servers in FOLOVLLM_SERVERS: {"m6": "http://127.0.0.1:8000/v1"}."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

SERVERS: dict[str, str] = json.loads(os.environ.get("FOLOVLLM_SERVERS", "{}"))
MODEL = os.environ.get("FOLOVLLM_MODEL", "")
collect_ignore_glob = [] if SERVERS else ["test_*.py"]


@pytest.fixture
def model() -> str:
    return MODEL


@pytest.fixture
def weather() -> Any:
    from shapes import Weather  # type: ignore[import-not-found]

    return Weather


@pytest.fixture
def url() -> str:
    """Of the first server."""
    return next(iter(SERVERS.values()))


@pytest.fixture(params=SERVERS)
def any_url(request: pytest.FixtureRequest) -> str:
    """Of each server in turn."""
    return SERVERS[request.param]
