"""The server's tests need its libraries, and clients of it; where they are missing, one test says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import stages
from common import Engine
from tests.test_cli import byte_tokenizer

if TYPE_CHECKING:
    from tests.serving.running import Process, Running

LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx2", "schemathesis", "opentelemetry.sdk")


def missing() -> list[str]:
    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in LIBRARIES if not found(name)]


collect_ignore_glob = ["test_with_*.py"] if missing() else []


@pytest.fixture
def serve(build: Callable[..., Engine]) -> Iterator[Callable[..., Running]]:
    """A server over a tiny engine that talks in bytes. `engine`: options of it; `spans`, and the server's options."""
    from tests.serving.running import Running

    servers: list[Running] = []

    def start(
        stage: str = "m3", engine: dict[str, Any] | None = None, talks: bool = True, spans: Any = None, **options: Any
    ) -> Running:
        built = build(stage, **(engine or {}))
        if talks:
            built.tokenizer = byte_tokenizer()
        servers.append(Running(built, spans, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="package")
def shared_server() -> Iterator[Running]:
    from tests.serving.running import TINY, Running

    with stages.build("m3", model=TINY, device="cpu") as engine:
        engine.tokenizer = byte_tokenizer()
        server = Running(engine)
        yield server
        server.close()


@pytest.fixture
def running(shared_server: Running) -> Iterator[Running]:
    """A server over m3 that talks in bytes: one for all tests that leave it as they found it."""
    yield shared_server
    shared_server.wait_until_idle()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """A server as a process of its own, with the options that are given."""
    from tests.serving.running import Process

    started: list[Process] = []

    def one(*options: str, **popen: Any) -> Process:
        started.append(Process(*options, **popen))
        return started[-1]

    yield one
    for process in started:
        process.kill()
