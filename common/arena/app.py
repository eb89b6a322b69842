"""The arena's web page: static files, two commands, one stream of events for all viewers; and its server."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.arena.figures import FIGURES
from common.arena.presets import OWN, Preset, find, presets_for
from common.arena.race import Race
from common.arena.side import Event, Side
from common.errors import UserError
from common.execution.threads import usable_cpus
from common.serving.formats import as_event
from common.serving.listener import address

STATIC = Path(__file__).parent / "static"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src 'self' data:"


class Arena:
    """One race at a time, and its events for all viewers: a late one gets them from the beginning. Everything here runs
    on the event loop; the race has a thread of its own."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.race: Race | None = None
        self._history: list[bytes] = []
        self._listeners: set[asyncio.Queue[bytes]] = set()

    def start(self, preset: Preset, mode: str) -> None:
        loop = asyncio.get_running_loop()

        def on_loop(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: no page is left
                loop.call_soon_threadsafe(function, *arguments)

        def run() -> None:
            try:
                race.run()
            finally:
                on_loop(setattr, self, "race", None)

        self.race = race = Race(self.sides, preset, mode, lambda event: on_loop(self._tell, event))
        threading.Thread(target=run, name="race", daemon=True).start()

    def stop(self) -> bool:
        """False: there is no race."""
        if self.race is not None:
            self.race.stop()
        return self.race is not None

    def _tell(self, event: Event) -> None:
        if event["event"] == "race":
            self._history.clear()
        self._history.append(as_event(event))
        for listener in self._listeners:
            listener.put_nowait(self._history[-1])

    async def listen(self) -> AsyncIterator[bytes]:
        """The server ends it when the client leaves."""
        messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._listeners.add(messages)
        welcome = {"event": "welcome", "stages": [side.stage for side in self.sides]}
        try:
            yield b"".join([as_event(welcome), *self._history, as_event({"event": "now"})])
            while True:
                yield await messages.get()
        finally:
            self._listeners.discard(messages)


class Start(BaseModel):
    model_config = ConfigDict(extra="forbid")
    preset: str
    mode: Literal["turns", "together"] = "turns"
    prompts: list[str] = []


def create_app(sides: Sequence[Side]) -> FastAPI:
    """The routes. Pages of other sites cannot use them: the host must be this one, and FastAPI takes a command's body
    only as `application/json`, which a browser lets another site send only after asking this one."""
    arena, numbers = Arena(sides), [side.number for side in sides]

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        arena.stop()

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
        presets = [*presets_for(numbers), OWN]
        return {
            "sides": [{"stage": side.stage, "title": side.title} for side in sides],
            "presets": [{"key": p.key, "title": p.title, "claim": p.claim, "watch": p.watch} for p in presets],
            "figures": {key: {"title": figure.title, "unit": figure.unit} for key, figure in FIGURES.items()},
            "cores": usable_cpus(),
        }

    @app.get("/api/events")
    async def events() -> StreamingResponse:
        """Server-sent events: see `player` and `race`."""
        return StreamingResponse(arena.listen(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/api/race", status_code=202)
    async def start(body: Start) -> Response:
        if arena.race is not None:
            return JSONResponse({"error": "a race is on: stop it first"}, 409)
        preset = find(body.preset, numbers, body.prompts)
        arena.start(preset, body.mode)
        return JSONResponse({"started": preset.key}, 202)

    @app.post("/api/stop")
    async def stop(body: dict[str, Any]) -> dict[str, bool]:
        return {"stopped": arena.stop()}

    return app


def server_of(sides: Sequence[Side]) -> uvicorn.Server:
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "ws": "none", "server_header": False}
    config = uvicorn.Config(create_app(sides), **quiet, timeout_graceful_shutdown=1)  # streams never end by themselves
    return uvicorn.Server(config)


def run(sides: Sequence[Side], listener: socket.socket) -> None:
    """Returns after SIGTERM; Ctrl-C raises `KeyboardInterrupt`."""
    names = " against ".join(side.stage for side in sides)
    print(f"{names}: open {address(listener)} in a browser (Ctrl-C ends it)", flush=True)
    server_of(sides).run(sockets=[listener])
