"""Hundreds of requests of every kind at once, some of whose clients leave: all end, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import httpx2
import pytest

from tests.engine_checks import PAGED, TOKEN_BYTES, assert_empty
from tests.serving.running import ALL, SOME, TINY, Running, client_of
from tests.serving.soak import problems
from tests.serving.soak import soak as bad_clients

Serve = Callable[..., Running]
CONCURRENCY = 32
ENGINE: dict[str, Any] = {"max_num_seqs": 12, "max_model_len": 128}
SCARCE = {"block_size": 4, "kv_cache_memory": 500 * TOKEN_BYTES, "swap_space": 100 * TOKEN_BYTES}
"""Where memory is paged, so little of it that requests are preempted and swapped."""


def resident_bytes() -> int:
    """Of this process: its second figure, in pages of 4 KiB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def body_of(random: Random) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": TINY,
        "max_tokens": random.choice([1, 4, 20, 60]),
        "n": random.choice([1, 1, 1, 1, 3]),
        "stream": random.random() < 0.6,
        "temperature": random.choice([0, 1]),
    }
    text = "".join(random.choice("abc ") for _ in range(random.choice([1, 3, 17, 50])))
    if random.random() < 0.5:
        return "/v1/chat/completions", body | {
            "messages": [{"role": "user", "content": text}], "logprobs": random.random() < 0.3,
        }  # fmt: skip
    if random.random() < 0.1:
        body["max_tokens"] = 500  # does not fit: 400
    return "/v1/completions", body | {"prompt": random.choice([text, list(text.encode()), [text, "b"]]), "stop": "ab"}


def one_request(running: Running, client: httpx2.Client, random: Random) -> str:
    """What became of it: an answer, a refusal, or we left: before the answer, or in the middle of it."""
    path, body = body_of(random)
    leaves = random.random() < 0.3
    try:
        with client.stream("POST", path, json=body, timeout=random.choice([0.01, 0.1]) if leaves else 100) as response:
            if leaves and body["stream"]:
                next(response.iter_bytes(), b"")
                return "left"
            content = response.read()
    except httpx2.TimeoutException:
        assert leaves
        return "left"
    if response.status_code != 200:
        return str(response.status_code)
    if body["stream"]:
        assert content.endswith(b"data: [DONE]\n\n"), content[-200:]
    return "answered"


def soak(running: Running, count: int, seed: int) -> Counter[str]:
    """`count` requests from `CONCURRENCY` clients."""
    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        with client_of(running.url) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                outcome = one_request(running, client, Random(f"{seed}-{number}"))
                with lock:
                    outcomes[outcome] += 1

    threads = [threading.Thread(target=work) for _ in range(CONCURRENCY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def rounds(serve: Serve, stage: str, counts: list[int]) -> list[int]:
    """Soak in rounds; the memory after each."""
    running = serve(stage, engine=ENGINE | (SCARCE if stage in PAGED else {}), max_queue=200)
    memory: list[int] = []
    for seed, count in enumerate(counts):
        outcomes = soak(running, count, seed)
        assert sum(outcomes.values()) == count, f"{count - sum(outcomes.values())} clients failed: {outcomes}"
        assert set(outcomes) <= {"answered", "left", "400"}, outcomes
        assert outcomes["answered"] > count / 3 and outcomes["left"] > count / 20, outcomes
        running.wait_until_idle()
        assert_empty(running.engine)
        gc.collect()
        memory.append(resident_bytes())
    return memory


@pytest.mark.parametrize("stage", SOME)
def test_a_short_soak(serve: Serve, stage: str) -> None:
    rounds(serve, stage, [30])


def test_a_soak_of_seconds_with_bad_clients() -> None:
    """Memory takes longer to judge: `python -m tests.serving.soak`."""
    result = bad_clients(2, "fp32")
    assert problems(result | {"growth_mib": None}) == [], result["failures"]
    assert min(result["requests"].values()) >= 1 and set(result["requests"]) == set(result["clients"])


def test_a_soak_tells_what_was_wrong() -> None:
    good = {"failures": [], "growth_mib": 16, "most_connections": 60, "limits": {"max-connections": 60},
            "at_the_end": {"connections": 1}, "exit_status": 0}  # fmt: skip
    assert problems(good) == problems(good | {"growth_mib": None, "most_connections": None}) == []
    for bad in ({"failures": ["500"]}, {"growth_mib": 17}, {"most_connections": 61}, {"exit_status": 1},
                {"at_the_end": {"connections": 2}}):  # fmt: skip
        assert len(problems(good | bad)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ALL)
def test_500_requests_after_1000_leave_memory_as_it_was(serve: Serve, stage: str) -> None:
    _, first, second = rounds(serve, stage, [500, 500, 500])  # in the first one the trace and the allocator fill up
    assert second - first < 8 * 2**20, f"{(second - first) / 2**20:.1f} MiB more after the last round"
