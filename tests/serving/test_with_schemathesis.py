"""/openapi.json is true: whatever it allows is answered as it says, and never with a 500."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
import schemathesis.checks
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.depth import by_depth
from tests.serving.running import TINY, Running

Serve = Callable[..., Running]
KEY = "secret"
schemathesis.checks.load_all_checks()
NOT_HELD = positive_data_acceptance
"""A prompt may fit the schema and not the model (its vocabulary, its length): refusing it is right."""


def known_model(case: Any) -> None:
    """Most random bodies name no model that is here: half of them are corrected, so that they get further."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2 == 0:
        case.body["model"] = TINY
        for field in ("tools", "tool_choice", "priority", "stream_options"):
            case.body.pop(field, None)
        messages = case.body.get("messages")
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict) and not isinstance(message.get("content"), str):
                message["content"] = ""
            if isinstance(message, dict):
                message.pop("tool_calls", None)


def answers(operation: Any, headers: dict[str, str], examples: int) -> set[int]:
    """Statuses of random requests, each of them checked."""
    seen: set[int] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def holds(case: Any) -> None:
        known_model(case)
        response = case.call(headers=headers)
        seen.add(response.status_code)
        case.validate_response(response, headers=headers, excluded_checks=[NOT_HELD])

    holds()
    return seen


@pytest.mark.timeout(600)
def test_the_schema_is_kept(serve: Serve) -> None:
    running = serve(api_keys=(KEY,), admin_key=KEY, max_tokens=8, engine={"max_model_len": 128})
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:
        seen = answers(operation, headers, by_depth(8, 150))
        wanted = 404 if "{" in operation.label else 200  # no random name is that of the model
        assert wanted in seen, f"{operation.label}: {seen}"
    running.wait_until_idle()


def test_errors_are_in_the_schema_and_422_is_not(serve: Serve) -> None:
    page = serve(api_keys=(KEY,)).get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert page["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    for path, operations in page["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert ("security" in operation) == (path != "/health")
    assert set(page["paths"]["/v1/completions"]["post"]["responses"]) == {
        "200", "400", "401", "404", "413", "429", "500", "503",
    }  # fmt: skip
