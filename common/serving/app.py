"""The endpoints."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.engine import Engine
from common.serving import errors, openapi, parameters
from common.serving.answer import Answer, ClientGone
from common.serving.engine_thread import Delta
from common.serving.errors import ApiError, shutting_down
from common.serving.formats import LIGHT, ChatFormat, Format, TextFormat, as_event, as_json
from common.serving.gate import CLIENT_GONE, salt_of
from common.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from common.serving.service import Service
from common.serving.tools import ToolParser
from common.text.prompts import Prompt
from common.watch.trace import StepTrace


def create_app(service: Service) -> FastAPI:
    """The routes over a service, whose engine thread starts and stops with the app."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.thread.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(service.thread.stop)

    # no pages of documentation: they load their scripts from the internet; no redirects: they name the client's Host
    without: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title=f"FoloVLLM {service.engine.stage}", lifespan=lifespan, **without)
    errors.install(app)
    engine, name = service.engine, service.model_name
    created = int(time.time())
    model: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "folovllm"}
    model["max_model_len"] = engine.max_model_len

    @app.post("/v1/chat/completions", **openapi.COMPLETIONS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        prompts = [await asyncio.to_thread(parameters.conversation, body.messages, body.tools, engine.tokenizer,
                                           body.tool_choice)]  # fmt: skip
        new_parser = parameters.tool_parser(engine, body, service.options)
        return await _complete(service, body, request, prompts, ChatFormat, body.top_logprobs or 0, new_parser)

    @app.post("/v1/completions", **openapi.COMPLETIONS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        prompts = parameters.completion_prompts(body)
        return await _complete(service, body, request, prompts, TextFormat, body.logprobs or 0)

    @app.post("/tokenize", **openapi.TOKENS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """A text or a conversation as token ids."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either 'prompt' or 'messages'.", param="prompt")
        prompt: Prompt = body.prompt or ""
        if body.messages is not None and body.add_special_tokens:
            raise ApiError(400, "A chat's template writes its special tokens.", param="add_special_tokens")
        if body.messages is not None:
            prompt = await asyncio.to_thread(parameters.conversation, body.messages, body.tools, engine.tokenizer)
        elif body.add_special_tokens is False:
            prompt = parameters.BareText(prompt)
        _check_model(body.model, name)
        tokens = await service.tokenize(prompt, body.chat_template_kwargs)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
        read = engine.tokenizer.backend.id_to_token if engine.tokenizer and body.return_token_strs else None
        return await service.write(lambda: _json({**answer, "token_strs": read and [read(t) for t in tokens]}, 1))

    @app.post("/detokenize", **openapi.TOKENS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, with special tokens."""
        _check_model(body.model, name)
        if engine.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: token ids have no text")
        if max(body.tokens, default=0) >= engine.tokenizer.vocab_size:
            text = f"Token ids are below {engine.tokenizer.vocab_size}, not {max(body.tokens):.3g}."
            raise ApiError(400, text, param="tokens")
        decode = engine.tokenizer.backend.decode
        return {"prompt": await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)}

    @app.get("/v1/models", **openapi.PLAIN)
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}", **openapi.NAMED)
    async def model_of_name(wanted: str) -> dict[str, Any]:
        _check_model(wanted, name)
        return model

    @app.head("/health", include_in_schema=False)
    @app.get("/health", **openapi.HEALTH)
    async def health() -> JSONResponse:
        """200 while requests are taken and steps work, else 503."""
        status = "draining" if service.draining else "ok" if service.thread.healthy else "failing"
        facts = {"status": status, "stage": engine.stage, "model": name}
        return JSONResponse(facts, 200 if status == "ok" else 503)

    @app.get("/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        """For Prometheus."""
        page = service.metrics.render(await service.figures())
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/trace", **openapi.TRACE)
    async def trace() -> Response:
        """The last steps in the Trace Event Format: save it, and open it in Perfetto or chrome://tracing."""
        steps = await service.thread.call(_copy_of_trace)
        return await service.write(lambda: _json(steps.to_chrome(), 1))

    openapi.describe(app, needs_key=bool(service.options.api_keys))
    return app


async def messages_of(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """An answer without a socket. To stop reading early is to leave, which aborts the request."""
    answer: asyncio.Queue[Message | None] = asyncio.Queue()
    request: list[Message] = [{"type": "http.request", "body": body}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if not request:
            await gone.wait()
        return request.pop() if request else {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, answer.put))  # pyright: ignore[reportArgumentType]
    task.add_done_callback(lambda _: answer.put_nowait(None))  # what it raised after its 500 is logged
    try:
        while message := await answer.get():
            yield message
    finally:
        gone.set()


def _check_model(wanted: str | None, name: str) -> None:
    if wanted not in (None, name):
        message = f"The model '{wanted}' does not exist here. This server has '{name}'."
        raise ApiError(404, message, param="model", code="model_not_found")


async def _complete(
    service: Service,
    body: Sampling,
    request: Request,
    prompts: Sequence[Prompt],
    kind: type[Format],
    top: int,
    new_parser: Callable[[], ToolParser] | None = None,
) -> Response:
    """Wait for the first token before the status line is sent: an error until then has a status of its own. A client
    that leaves, now or later, aborts its request."""
    _check_model(body.model, service.model_name)
    request_id, salt = request.state.request_id, request.state.salt
    if body.cache_salt is not None:
        salt = salt_of(f"{salt or ''} {body.cache_salt}".encode(errors="surrogatepass"))
    answer = await service.submit(body, prompts, request_id, salt, request.headers.get("traceparent"))
    form = kind(request_id, service, body, answer, top, new_parser)
    watch = asyncio.create_task(_watch(request, answer))
    try:
        deltas = await answer.next()
        if not body.stream:
            choices: list[Delta] = []
            while deltas:
                choices += deltas
                deltas = await answer.next()
            choices.sort(key=lambda choice: choice.index)
            watch.cancel()
            return await service.write(lambda: _json(form.whole(choices)))  # slow: log-probabilities
    except BaseException as error:
        watch.cancel()
        answer.cancel()
        if isinstance(error, ClientGone):
            return Response(status_code=CLIENT_GONE)
        if isinstance(error, asyncio.CancelledError):  # the server ends, and waits no longer
            raise shutting_down() from None
        raise
    pieces = _pieces(service, answer, form, deltas, watch)
    return EventStream(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class EventStream(StreamingResponse):
    """Without the second task in which Starlette waits for a disconnect: `_watch` does that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _watch(request: Request, answer: Answer) -> None:
    """The body has been read: the client's next message is its disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel(gone=True)


def _json(value: Any, depth: int = 4) -> Response:
    return Response(as_json(value, depth), media_type="application/json")


async def _pieces(
    service: Service, answer: Answer, form: Format, deltas: list[Delta], watch: asyncio.Task[None]
) -> AsyncIterator[bytes]:
    """Server-sent events. An error in the middle is an event too; without `[DONE]` clients know that it is not all."""
    try:
        while deltas:
            much = form.work(deltas) > LIGHT
            yield await service.write(partial(form.events, deltas)) if much else form.events(deltas)
            deltas = await answer.next()
        yield b"".join(map(as_event, form.last_pieces()))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield as_event(error.body())
    except asyncio.CancelledError:  # as above
        yield as_event(shutting_down().body())
    except ClientGone:
        return
    finally:
        watch.cancel()
        answer.cancel()


def _copy_of_trace(engine: Engine) -> StepTrace:
    """Quick, since the engine waits for it; turning it into JSON is slow."""
    assert engine.trace is not None
    trace = StepTrace()
    trace.steps = engine.trace.steps.copy()
    return trace
