"""The arena's web page: static files, three commands, and one stream of events for everybody who watches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.arena.figures import FIGURES
from common.arena.presets import OWN, find, presets_for
from common.arena.race import Race
from common.arena.side import Event, Side
from common.errors import UserError
from common.execution.threads import usable_cpus

STATIC = Path(__file__).parent / "static"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src 'self' data:"


class Hub:
    """The events of the last race, and who hears the next ones. Whoever comes late hears it from its beginning."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._welcome = {"event": "welcome", "stages": stages}
        self._history: list[bytes] = []
        self._listeners: set[asyncio.Queue[bytes]] = set()

    def tell(self, event: Event) -> None:
        message = as_message(event)
        if event["event"] == "race":
            self._history.clear()
        self._history.append(message)
        for listener in self._listeners:
            listener.put_nowait(message)

    async def listen(self) -> AsyncIterator[bytes]:
        """The server ends it when the client leaves."""
        messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._listeners.add(messages)
        try:
            yield b"".join([as_message(self._welcome), *self._history, as_message({"event": "now"})])
            while True:
                yield await messages.get()
        finally:
            self._listeners.discard(messages)


def as_message(event: Event) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Arena:
    """One race at a time. Everything here runs on the event loop; the race has a thread of its own."""

    sides: Sequence[Side]
    hub: Hub
    race: Race | None = None

    @property
    def numbers(self) -> list[int]:
        return [side.number for side in self.sides]

    def start(self, race: Race, loop: asyncio.AbstractEventLoop) -> None:
        def run() -> None:
            try:
                race.run()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody watches any more
                    loop.call_soon_threadsafe(self._ended)

        self.race = race
        threading.Thread(target=run, name="race", daemon=True).start()

    def _ended(self) -> None:
        self.race = None


class Start(BaseModel):
    """POST /api/race."""

    model_config = ConfigDict(extra="forbid")
    preset: str
    mode: Literal["turns", "together"] = "turns"
    prompts: list[str] = []


def create_app(sides: Sequence[Side]) -> FastAPI:
    """The routes. Pages of other sites cannot use them: the host must be this one, and a command must say that it is
    JSON, which a browser allows no other site without asking."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        if arena.race is not None:
            arena.race.stop()

    arena = Arena(sides, Hub([side.stage for side in sides]))
    app = FastAPI(title="FoloVLLM arena", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})

    @app.get("/api/setup")
    async def setup() -> dict[str, Any]:
        """What there is to choose from."""
        presets = [*presets_for(arena.numbers), OWN]
        return {
            "sides": [{"stage": side.stage, "title": side.title} for side in arena.sides],
            "presets": [{"key": p.key, "title": p.title, "claim": p.claim, "watch": p.watch} for p in presets],
            "figures": {key: {"title": figure.title, "unit": figure.unit} for key, figure in FIGURES.items()},
            "cores": usable_cpus(),
        }

    @app.get("/api/events")
    async def events() -> StreamingResponse:
        """Server-sent events: see `player` and `race`."""
        return StreamingResponse(
            arena.hub.listen(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    @app.post("/api/race", status_code=202)
    async def start(body: Start) -> Response:
        if arena.race is not None:
            return JSONResponse({"error": "a race is on: stop it first"}, 409)
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arena.hub.tell, event)

        preset = find(body.preset, arena.numbers, body.prompts)
        arena.start(Race(arena.sides, preset, body.mode, tell), loop)
        return JSONResponse({"started": preset.key}, 202)

    @app.post("/api/stop")
    async def stop(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return JSONResponse({"error": "say that it is application/json"}, 415)
        if arena.race is not None:
            arena.race.stop()
        return JSONResponse({"stopped": arena.race is not None})

    return app
