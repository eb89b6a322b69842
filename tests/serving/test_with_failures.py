"""Clients that go away, steps that fail, and the end of the server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from common import Engine
from common.serving import parameters, server
from common.serving.engine_thread import FAILING_AFTER
from common.serving.service import Service
from tests.serving.running import SOME, TINY, Running, Steps, slow_down, wait_until

Serve = Callable[..., Running]
LONG: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 400, "temperature": 0}
SHORT = LONG | {"max_tokens": 3}


class Failing:
    """Makes steps fail while `times` is above 0, before or after the plan was made."""

    def __init__(self, engine: Engine, where: str = "submit") -> None:
        self.times = 0
        owner: Any = engine.runner if where == "submit" else engine.scheduler
        original = getattr(owner, where)

        def sometimes(*arguments: Any) -> Any:
            if self.times > 0:
                self.times -= 1
                raise RuntimeError("secret detail of a defect")
            return original(*arguments)

        setattr(owner, where, sometimes)


# -- a client that goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("stage", SOME)
def test_a_client_that_goes_away_aborts_its_request_within_one_step(serve: Serve, stage: str, stream: bool) -> None:
    running = serve(stage, talks=False)
    steps = Steps(running.engine)
    noticed: list[int] = []
    obeyed: list[int] = []
    service_abort, engine_abort = running.service.thread.abort, running.engine.abort
    running.service.thread.abort = lambda job: (noticed.append(steps.begun), service_abort(job))[1]
    running.engine.abort = lambda id: (obeyed.append(steps.begun), engine_abort(id))[1]
    with running.visit(LONG | {"prompt": [1, 2, 3], "stream": stream}) as client:
        steps.allow(3)
        if stream:
            assert client.getresponse().read(6) == b"data: "
        wait_until(lambda: steps.begun == 4)
    wait_until(lambda: bool(noticed))  # in the middle of a step
    steps.allow()
    wait_until(lambda: bool(obeyed))
    assert noticed[0] == 4
    assert obeyed[0] <= 5
    running.wait_until_idle()
    assert running.engine.metrics()["aborted"] == 1
    assert running.post("/v1/completions", SHORT | {"prompt": [1, 2, 3]}).status_code == 200


def test_who_leaves_while_waiting_is_taken_out_of_the_queue(serve: Serve) -> None:
    running = serve(engine={"max_num_seqs": 1})
    steps = Steps(running.engine)
    with running.visit(LONG | {"stream": True, "max_tokens": 40}) as first:
        wait_until(lambda: steps.begun == 1)
        with running.visit(LONG):
            running.wait_until_told()
            steps.allow(3)
            wait_until(lambda: steps.begun == 4)
            assert running.engine.metrics()["waiting"] == 1
        running.wait_until_told()
        steps.allow(3)
        wait_until(lambda: running.service.open_choices == 1)
        steps.allow()
        assert first.getresponse().read().endswith(b"data: [DONE]\n\n"), "the other one is not disturbed"
    running.wait_until_idle()


# -- a step that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SOME)
def test_a_failed_step_answers_500_to_those_in_it_and_the_server_goes_on(serve: Serve, stage: str) -> None:
    running = serve(stage)
    failing = Failing(running.engine)
    for stream in (False, True):
        failing.times = 1
        response = running.post("/v1/completions", LONG | {"stream": stream, "n": 2})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert response.json()["error"]["code"] == "step_failed"
        assert "secret" not in response.text
        assert running.post("/v1/completions", SHORT).status_code == 200
        running.wait_until_idle()
    assert running.get("/health").status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(serve: Serve) -> None:
    running = serve()
    failing = Failing(running.engine)
    steps = Steps(running.engine)
    steps.allow(8)
    stream = running.client.completions.create(**LONG, stream=True)
    next(iter(stream))
    wait_until(lambda: steps.begun == 9)
    failing.times = 1
    steps.allow()
    with pytest.raises(openai.APIError, match="step that computed this request failed"):
        list(stream)
    steps = Steps(running.engine)
    with running.visit(LONG | {"stream": True}) as client:
        steps.allow(8)
        wait_until(lambda: steps.begun == 9)
        failing.times = 1
        steps.allow()
        raw = client.getresponse().read()
    assert b'"code": "step_failed"' in raw or b'"code":"step_failed"' in raw
    assert b"[DONE]" not in raw
    running.wait_until_idle()


def test_those_who_wait_do_not_share_a_failed_step(serve: Serve) -> None:
    running = serve(engine={"max_num_seqs": 1})
    steps = Steps(running.engine)
    failing = Failing(running.engine)
    answers: dict[str, int] = {}

    def ask(name: str) -> None:
        answers[name] = running.post("/v1/completions", LONG | {"max_tokens": 20}).status_code

    first, second = threading.Thread(target=ask, args=("first",)), threading.Thread(target=ask, args=("second",))
    first.start()
    steps.allow(3)
    wait_until(lambda: steps.begun == 4)
    second.start()
    running.wait_until_told()
    failing.times = 1
    steps.allow()
    first.join()
    second.join()
    assert answers == {"first": 500, "second": 200}
    running.wait_until_idle()


@pytest.mark.parametrize("where", ["submit", "plan"])
def test_steps_that_all_fail_answer_everybody_and_do_not_spin(serve: Serve, where: str) -> None:
    running = serve()
    failing = Failing(running.engine, where)
    failing.times = 10_000
    statuses = [running.post("/v1/completions", SHORT).status_code for _ in range(FAILING_AFTER + 1)]
    assert statuses == [500] * (FAILING_AFTER + 1)
    assert running.get("/health").json()["status"] == "failing"
    left = failing.times
    time.sleep(0.1)
    assert failing.times == left > 10_000 - 20 * FAILING_AFTER, "without requests, nothing is tried"
    failing.times = 0
    assert running.post("/v1/completions", SHORT).status_code == 200
    assert running.get("/health").status_code == 200
    running.wait_until_idle()


def test_an_engine_that_cannot_take_a_request_at_all_answers_500(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()

    def broken(*arguments: Any, **options: Any) -> str:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(running.engine, "add_request", broken)
        assert running.post("/v1/completions", SHORT).status_code == 500
    assert running.post("/v1/completions", SHORT).status_code == 200
    running.wait_until_idle()


def test_a_defect_outside_of_the_engine_is_500_in_openais_form(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()

    async def broken(*arguments: Any) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(Service, "submit", broken)
        response = running.post("/v1/completions", SHORT)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert running.post("/v1/completions", SHORT).status_code == 200


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SOME)
def test_a_drain_lets_streams_finish_and_takes_nothing_new(serve: Serve, stage: str) -> None:
    running = serve(stage, talks=False)
    steps = Steps(running.engine)
    body = LONG | {"prompt": [1, 2, 3], "stream": True, "max_tokens": 20}
    with running.visit(body) as client:
        steps.allow(2)
        wait_until(lambda: steps.begun == 3)
        running.service.drain(30)
        refused = running.post("/v1/completions", SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert running.get("/health").json()["status"] == "draining"
        running.server.should_exit = True
        steps.allow()
        answer = client.getresponse().read()
    assert answer.endswith(b"data: [DONE]\n\n")
    assert answer.count(b"data: ") == 21


def test_who_is_not_done_when_the_drain_ends_gets_503(serve: Serve) -> None:
    running = serve(drain=0.3, engine={"max_num_seqs": 1})
    steps = slow_down(running.engine, 0.02)
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(running.post("/v1/completions", LONG))) for _ in "12"]
    for thread in threads:
        thread.start()
    wait_until(lambda: running.service.open_choices == 2)
    running.server.handle_exit(signal.SIGTERM, None)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [503, 503]
    assert steps[0] < 150, "no longer than 3 s"


def test_a_drain_waits_for_prompts_that_are_being_encoded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    encode, go = parameters.encode, threading.Event()
    monkeypatch.setattr(parameters, "encode", lambda *given: (go.wait(30), encode(*given))[1])
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", SHORT).status_code))
    thread.start()
    wait_until(lambda: running.service.open_choices == 1)
    running.server.handle_exit(signal.SIGTERM, None)
    time.sleep(0.3)
    assert running.get("/health").json()["status"] == "draining", "the door is open"
    go.set()
    thread.join()
    assert answers == [200]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("grace", [5, 0], ids=["short steps", "a step beyond all patience"])
def test_a_second_signal_tells_everybody_and_ends(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
    grace: int,
) -> None:
    monkeypatch.setattr(server, "GRACE", grace)
    running = serve(talks=False)
    answers: list[httpx2.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(running.post("/v1/completions", LONG | {"prompt": [1, 2, 3], "stream": stream}))
    )
    steps = Steps(running.engine)
    thread.start()
    steps.allow(2)
    wait_until(lambda: steps.begun == 3)
    running.server.handle_exit(signal.SIGINT, None)
    assert running.get("/health").json()["status"] == "draining"
    running.server.handle_exit(signal.SIGINT, None)
    if grace:
        steps.allow()
    thread.join()
    assert steps.begun <= 4
    steps.allow()
    [answer] = answers
    assert answer.status_code == (200 if stream else 503)
    assert b'"shutting_down"' in answer.content and b"[DONE]" not in answer.content
    assert ("Cancel 1 running task" in caplog.text) == (grace == 0)
    assert "Traceback" not in caplog.text
