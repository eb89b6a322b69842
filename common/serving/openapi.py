"""What /openapi.json says beyond the types of the requests: the answers, the errors, the key."""

import json
from pathlib import Path
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


def _responses(content: dict[str, Any], *errors: int) -> dict[str, Any]:
    """Of a route: its answers by media type, and the statuses of its errors."""
    success = {200: {"content": {kind: {"schema": schema} for kind, schema in content.items()}}}
    return {"responses": success | {status: {"model": ErrorBody} for status in errors}}


_OBJECT = {"type": "object"}
_COMPLETION = json.loads((Path(__file__).parent / "completion.schema.json").read_text(encoding="utf-8"))
_JSON = {"application/json": _OBJECT}

COMPLETIONS = _responses({"application/json": _COMPLETION, "text/event-stream": {}}, 400, 401, 404, 413, 429, 500, 503)
PLAIN = _responses(_JSON, 400, 401, 413)
TRACE = _responses(_JSON, 400, 401, 403, 413)
TOKENS = _responses(_JSON, 400, 401, 404, 413)
NAMED = TOKENS
METRICS = _responses({"text/plain": {"type": "string"}}, 400, 401, 403, 413)
HEALTH = _responses(_JSON, 400, 413)
HEALTH["responses"][503] = dict(HEALTH["responses"][200])


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
