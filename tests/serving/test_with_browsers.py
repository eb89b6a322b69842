"""What a web page in a browser, a health check and a proxy ask: origins, HEAD, redirects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.errors import UserError
from common.serving.options import ServerOptions
from tests.serving.running import TINY, Running, error_of

Serve = Callable[..., Running]
PAGE = "http://localhost:3000"
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 2}
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_a_page_of_an_allowed_origin_may_ask_and_no_other(serve: Serve) -> None:
    running = serve(api_keys=("k",), allow_origin=(PAGE,))
    preflight = running.http.options("/v1/chat/completions", headers=PREFLIGHT)  # without the key, as browsers send it
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert {"GET", "HEAD", "POST"} == set(preflight.headers["access-control-allow-methods"].split(", "))
    assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
    answers = [
        running.post("/v1/completions", PROMPT, headers={"Origin": PAGE, "Authorization": "Bearer k"}),
        running.post("/v1/completions", PROMPT, headers={"Origin": PAGE}),
        running.get("/v1/nothing", headers={"Origin": PAGE, "Authorization": "Bearer k"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 404]
    for answer in answers:  # a page can read errors, too
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        assert "Origin" in answer.headers["vary"]
    for other in ("http://localhost:3001", "https://localhost:3000", "http://localhost:3000.evil.example", "null"):
        assert running.http.options("/v1/completions", headers=PREFLIGHT | {"Origin": other}).status_code == 400
        answer = running.get("/v1/models", headers={"Origin": other, "Authorization": "Bearer k"})
        assert "access-control-allow-origin" not in answer.headers


def test_all_origins_never_come_with_credentials(serve: Serve) -> None:
    running = serve(api_keys=("k",), allow_origin=("*",))
    for headers in ({"Origin": PAGE}, {"Origin": PAGE, "Cookie": "a=b"}):
        answer = running.get("/health", headers=headers)
        assert answer.headers["access-control-allow-origin"] in ("*", PAGE)
        assert "access-control-allow-credentials" not in answer.headers


def test_without_origins_there_are_no_such_headers(running: Running) -> None:
    assert error_of(running.http.options("/v1/completions", headers=PREFLIGHT), 405)
    answer = running.get("/health", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["localhost:3000", PAGE + "/", PAGE + "/page", "", "ftp://a", "*"])
def test_origins_that_no_browser_sends_are_refused(origin: str) -> None:
    with pytest.raises(UserError, match="allow_origin"):
        ServerOptions(allow_origin=(origin,))
    ServerOptions(allow_origin=("*",), host="0.0.0.0")


def test_health_answers_head_without_a_body(serve: Serve) -> None:
    running = serve(api_keys=("k",))
    answer = running.http.head("/health")
    assert answer.status_code == 200 and answer.content == b""
    running.service.drain(30)
    assert running.http.head("/health").status_code == 503


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/v1/completions/", "//health", "/metrics/"])
def test_no_answer_leads_elsewhere(serve: Serve, path: str) -> None:
    """A redirect would carry the Host that a client sent."""
    running = serve(api_keys=("k",))
    headers = {"Host": "evil.example", "Authorization": "Bearer k"}
    for answer in (running.get(path, headers=headers), running.post(path, {}, headers=headers)):
        assert answer.status_code in (404, 405) and "location" not in answer.headers
        assert "evil.example" not in answer.text
