"""What the server says about itself: metrics, the trace, health."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.serving.metrics import REQUEST_SECONDS, TOKEN_SECONDS
from tests.serving.running import SOME, TINY, Running, Steps, error_of, slow_down, wait_until
from tests.serving.test_with_soak import resident_bytes

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}


def metrics_of(running: Running | httpx2.Client, headers: dict[str, str] | None = None) -> dict[str, float]:
    """Sample name and labels to value, by a parser of Prometheus' own."""
    response = running.get("/metrics", headers=headers)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f",{value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_say_what_happened(serve: Serve) -> None:
    running = serve()
    before = metrics_of(running)
    assert before["folovllm_requests_running"] == before["folovllm_generation_tokens_total"] == 0
    assert before["folovllm_requests_total,error"] == 0  # a series that begins with 1 has no rate
    for _ in range(3):
        running.post("/v1/completions", PROMPT | {"n": 2})
    running.get("/v1/nothing")
    after = metrics_of(running)
    expected = {
        "prompt_tokens_total": 3 * 5,
        "generation_tokens_total": 3 * 2 * 4,
        "time_to_first_token_seconds_count": 3,
        "time_per_output_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 3 * 2 * 3,
        "queue_time_seconds_count": 3,
        "request_seconds_count": 3,
        "requests_total,ok": 3,
        "http_responses_total,/v1/completions,200": 3,
        "http_responses_total,other,404": 1,
        "finished_tokens_total,length": 3 * 2 * 4,
        "connections": 1,
        "requests_running": 0,
        "requests_waiting": 0,
        "requests_swapped": 0,
        "kv_usage_ratio": 0,
        "preemptions_total": 0,
        "info,m3": 1,
    }
    assert {name: after[f"folovllm_{name}"] for name in expected} == expected
    assert after["folovllm_steps_total"] == 12
    assert resident_bytes() / 2 < after["process_resident_memory_bytes"] < resident_bytes() * 2
    assert after["folovllm_kv_pool_bytes"] > 0
    assert 0 < after["folovllm_time_to_first_token_seconds_sum"] < after["folovllm_request_seconds_sum"]
    assert "folovllm_prefix_hit_rate" not in after, "no engine of these stages has one"


@pytest.mark.parametrize("bounds", [TOKEN_SECONDS, REQUEST_SECONDS])
def test_percentiles_are_right_to_two_thirds(bounds: tuple[float, ...]) -> None:
    """Also where a GPU makes a token in half a millisecond, or a prompt stalls others for seconds."""
    assert list(bounds) == sorted(bounds) and bounds[0] <= 0.001 and bounds[-1] >= 7.5
    assert all(later / earlier <= 5 / 3 + 1e-9 for earlier, later in pairwise(bounds))
    assert {0.002, 0.02, 0.2, 2} <= set(bounds)  # limits that people agree on are bounds themselves


def test_queries_and_alerts_name_metrics_that_exist(serve: Serve) -> None:
    there = metrics_of(serve("m6"))
    folder = Path("common/serving")
    for path in (folder / "OBSERVABILITY.md", folder / "observability" / "alerts.yml"):
        named = set(re.findall(r"folovllm_\w+", path.read_text(encoding="utf-8")))
        exist = {name.partition(",")[0] for name in there}
        assert len(named) > 5 and named <= exist, (path, named - exist)
    assert "folovllm_time_to_first_token_seconds_bucket,2.0" in there, "the limit in a query is a bound"
    rules = (folder / "observability" / "alerts.yml").read_text(encoding="utf-8")
    assert re.search(r"expr: deriv\((.*\n){3}.*queue grows by .*\$value", rules), "`and` has its left side's value"


@pytest.mark.parametrize("stage", ["m3", "m6"])
def test_metrics_show_the_engine_at_work(serve: Serve, stage: str) -> None:
    running = serve(stage, engine={"max_num_seqs": 1})
    slow_down(running.engine, 0.02)
    with running.http.stream("POST", "/v1/completions", json=PROMPT | {"stream": True, "max_tokens": 400}):
        waiting = threading.Thread(target=lambda: running.post("/v1/completions", PROMPT))
        waiting.start()
        wait_until(lambda: metrics_of(running)["folovllm_requests_waiting"] == 1)
        now = metrics_of(running)
        assert now["folovllm_requests_running"] == 1
        assert 0 < now["folovllm_kv_usage_ratio"] <= 1
    waiting.join()
    assert metrics_of(running)["folovllm_requests_total,abort"] == 1
    assert metrics_of(running)["folovllm_finished_tokens_total,abort"] > 0


@pytest.mark.parametrize("stage", SOME)
def test_latencies_are_counted_as_they_come_not_when_an_answer_ends(serve: Serve, stage: str) -> None:
    running = serve(stage, talks=False)
    slow_down(running.engine, 0.02)
    body = PROMPT | {"prompt": [1, 2, 3], "stream": True, "max_tokens": 400, "n": 2}
    with running.http.stream("POST", "/v1/completions", json=body) as response:
        parts = response.iter_bytes()
        for _ in range(3):
            next(parts)
        now = metrics_of(running)
        for name in ("time_to_first_token_seconds", "queue_time_seconds"):
            assert now[f"folovllm_{name}_count"] == 1
        assert now["folovllm_prompt_tokens_total"] == 3
        gaps = now["folovllm_inter_token_latency_seconds_count"]
        assert 2 <= gaps < now["folovllm_generation_tokens_total"] < 800
        assert now["folovllm_inter_token_latency_seconds_sum"] >= 0.02 * gaps
        assert now["folovllm_request_seconds_count"] == now["folovllm_time_per_output_token_seconds_count"] == 0


def test_metrics_do_not_wait_for_a_long_step(serve: Serve) -> None:
    running = serve()
    running.post("/v1/completions", PROMPT)
    before = metrics_of(running)
    steps = Steps(running.engine)
    answer = threading.Thread(target=lambda: running.post("/v1/completions", PROMPT | {"max_tokens": 1}))
    answer.start()
    wait_until(lambda: steps.begun == 1)
    during = metrics_of(running)  # the step cannot end before
    assert during["folovllm_steps_total"] == before["folovllm_steps_total"]
    steps.allow()
    answer.join()
    assert metrics_of(running)["folovllm_steps_total"] == before["folovllm_steps_total"] + 1


def test_the_prefix_cache_is_shared_by_requests_of_one_key_alone(serve: Serve) -> None:
    """m6, asked the same with the keys a, a and b: only the second one finds the first one's blocks."""
    running = serve("m6", api_keys=("a", "b"), admin_key="root", engine={"block_size": 8})
    prompt = PROMPT | {"prompt": "x" * 33}

    def figures() -> tuple[float, float]:
        metrics = metrics_of(running, {"Authorization": "Bearer root"})
        return metrics["folovllm_prefix_saved_tokens_total"], metrics["folovllm_prefix_hit_rate"]

    seen = [figures()]
    for key in "aab":
        assert running.post("/v1/completions", prompt, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        seen.append(figures())
    assert seen == [(0, 0), (0, 0), (32, 32 / 66), (32, 32 / 99)]


def test_the_trace_names_the_requests_and_their_steps(running: Running) -> None:
    request_id = running.post("/v1/completions", PROMPT).headers["x-request-id"]
    trace = running.get("/trace").json()
    rows = {event["args"]["name"]: event["tid"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    own = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == rows[request_id]]
    assert own == ["prefill", "decode", "decode", "decode"]


def test_health_and_names(serve: Serve) -> None:
    running = serve(served_name="mine")
    assert running.get("/health").json() == {"status": "ok", "stage": "m3", "model": "mine"}
    assert running.post("/v1/completions", PROMPT | {"model": "mine"}).json()["model"] == "mine"
    assert error_of(running.post("/v1/completions", PROMPT), 404)["code"] == "model_not_found"
    assert running.get("/docs").status_code == 404, "its page would load scripts from the internet"
