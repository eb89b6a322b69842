"""What /openapi.json says beyond the types of the requests: the answers, the errors, the key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error has this form."""

    error: ErrorFields


Responses = dict[int | str, dict[str, Any]]


def _errors(*statuses: int) -> Responses:
    return {status: {"model": ErrorBody} for status in statuses}


def _success(media_types: dict[str, Any]) -> Responses:
    return {200: {"content": {kind: {"schema": schema} for kind, schema in media_types.items()}}}


_OBJECT = {"type": "object"}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
}
_COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion", "text_completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["index", "finish_reason"]},
        },
        "usage": _USAGE,
    },
}
_UNKNOWN: Responses = {404: {"model": ErrorBody}}

COMPLETIONS: dict[str, Any] = {
    "responses": _success({"application/json": _COMPLETION, "text/event-stream": {"type": "string"}})
    | _errors(400, 401, 404, 413, 429, 500, 503)
}
PLAIN: dict[str, Any] = {"responses": _success({"application/json": _OBJECT}) | _errors(400, 401, 413)}
NAMED: dict[str, Any] = {"responses": _success({"application/json": _OBJECT}) | _errors(400, 401, 404, 413)}
METRICS: dict[str, Any] = {"responses": _success({"text/plain": {"type": "string"}}) | _errors(400, 401, 413)}
HEALTH: dict[str, Any] = {
    "responses": _success({"application/json": _OBJECT})
    | _errors(400, 413)
    | {503: {"content": {"application/json": {"schema": _OBJECT}}}}
}


def describe(app: FastAPI, needs_key: bool) -> None:
    """Correct what FastAPI writes by itself: fields that do not fit are 400 here, not 422; and say where a key goes."""
    written = app.openapi

    def openapi() -> dict[str, Any]:
        page = written()
        for path, operations in page["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_key and path != "/health":
                    operation["security"] = [{"key": []}]
        components = page.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(name, None)
        if needs_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return page

    app.openapi = openapi
