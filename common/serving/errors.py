"""Errors in the form that OpenAI's clients understand."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from common.errors import UserError, one_line
from common.sampling_params import SamplingParams

FIELDS = ("prompt", "priority", "cache_salt", *(field.name for field in fields(SamplingParams)))
NAMED = re.compile(rf"\b({'|'.join(FIELDS)})\b")  # in the engine's messages the one at fault is the first
UNREADABLE = "We could not parse the JSON body of your request."


class ApiError(HTTPException):
    """`param`: the field at fault; `code`: for programs, where OpenAI has one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status_code, "invalid_request_error")
        if self.status_code >= 500:
            kind = "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # Python's default escapes: a lone surrogate in what we quote is no reason to fail
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


def refused(error: UserError) -> ApiError:
    """By the engine."""
    found = NAMED.search(str(error))
    return ApiError(400, str(error), param=found and found[0])


def step_failed() -> ApiError:
    """Details are in the log: they may name paths or other people's requests."""
    return ApiError(500, "The step that computed this request failed. Try again.", code="step_failed")


def structure_failed(why: str) -> ApiError:
    """A grammar or schema that only turns out too hard while it is followed."""
    return ApiError(
        400, f"The answer's structure cannot be followed: {one_line(ValueError(why))}", code="structure_failed"
    )


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Every error in `app` is answered in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(request, error).response()

    for kind in (HTTPException, RequestValidationError, UserError, RecursionError, Exception):
        app.add_exception_handler(kind, answer)


def as_api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return refused(error)
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors())
    if isinstance(error, RecursionError):
        return ApiError(400, "A value in the body is nested too deeply.", code="invalid_value")
    if not isinstance(error, HTTPException):
        return ApiError(500, "The server failed to answer this request.")
    messages = {
        400: UNREADABLE,  # FastAPI's own, for a body that json.loads cannot take
        404: f"Invalid URL ({request.method} {request.url.path})",
        405: f"Not allowed to {request.method} {request.url.path}",
    }
    message = messages.get(error.status_code, error.detail or HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, message, headers=error.headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first field that does not fit the schema; a field of several types has one complaint for each type."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, UNREADABLE)
    location = _location(first)
    if first["type"] in ("unsupported", "unknown"):
        location.append(first["ctx"]["field"])
    if not location:
        return ApiError(400, "The body must be a JSON object, sent as Content-Type: application/json.")
    name = _path(location)
    if first["type"] == "unknown":
        return ApiError(400, f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if first["type"] == "unsupported":
        message = f"Unsupported parameter: '{name}' is not supported by this server."
        return ApiError(400, message, param=name, code="unsupported_parameter")
    field = _field(location)  # without the types of a field that takes several
    complaints = "; or ".join(dict.fromkeys(str(e["msg"]) for e in errors if _field(_location(e)) == field))
    return ApiError(400, f"Invalid '{field}': {complaints}.", param=field, code="invalid_value")


def _location(error: Mapping[str, Any]) -> list[str]:
    return [str(part) for part in error["loc"] if part != "body"]


def _field(location: Sequence[str]) -> str:
    """As in `messages[3].content`; of anything but messages and tools, the first name."""
    parts = location if location[:1] in (["messages"], ["tools"]) else location[:1]
    known = itertools.takewhile(lambda p: re.fullmatch(r"\d+|[a-z_]+", p) and p not in ("str", "bool", "int"), parts)
    return _path(known)


def _path(parts: Iterable[str]) -> str:
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)[1:]
