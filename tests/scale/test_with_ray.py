"""Replicas on a real Ray: minutes, so only in `make test-all`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.running import ROOT, client_of, error_of, wait_until

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[scale]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

MODEL = "smollm2-135m-instruct"  # its answers take long enough to be interrupted
LONG = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 150, "ignore_eos": True, "stream": True}
SHORT = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 4}


class Cluster:
    """`serve --replicas 2`, as a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "stages.m6_prefix_caching", "serve", "--model", MODEL, "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, start_new_session=True, **pipe)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: bool(self._greeting()) or self.process.poll() is not None, 200)
        assert self._greeting(), "".join(self.lines)
        self.url = self._greeting()[0]
        self.http = client_of(self.url)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def _greeting(self) -> list[str]:
        return [found[1] for line in self.lines if (found := re.search(r"replicas: (http://\S+)/v1", line))]

    def replicas(self) -> dict[int, int]:
        """The processes of the replicas of this cluster alone, and how many there are of each."""
        return {pid: 1 for pid in _children(self.process.pid) if "replica" in _name(pid) and "Serve" in _name(pid)}

    def end(self, sent: signal.Signals = signal.SIGTERM) -> int:
        os.kill(self.process.pid, sent)
        code = self.process.wait(100)
        self._reader.join(10)
        return code


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _children(pid: int) -> set[int]:
    """Of a process, and theirs."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for one in new for child in parents.get(one, [])} - found
        found |= new
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster("--replicas", "2")
    yield running
    if running.process.poll() is None:
        running.end()


def samples(page: str, name: str) -> dict[str, float]:
    """A sample of each replica, without other labels."""
    return {found[1]: float(found[2]) for found in re.finditer(rf'^{name}{{replica="(\w+)"}} (\S+)$', page, re.M)}


class Streams:
    """Several long answers, each read by a thread."""

    def __init__(self, url: str, count: int, body: dict[str, Any] = LONG) -> None:
        self.url, self.bodies = url, [b""] * count
        self.replica = [""] * count
        self.threads = [threading.Thread(target=self._read, args=(i, body)) for i in range(count)]
        for thread in self.threads:
            thread.start()
        wait_until(lambda: all(self.bodies))

    def _read(self, index: int, body: dict[str, Any]) -> None:
        given = {**body, "prompt": [index + 1, *body["prompt"]]}
        with client_of(self.url) as client, client.stream("POST", "/v1/completions", json=given) as response:
            assert response.status_code == 200
            self.replica[index] = response.headers["x-replica"]
            for part in response.iter_bytes():
                self.bodies[index] += part

    def join(self) -> None:
        for thread in self.threads:
            thread.join(100)
            assert not thread.is_alive()


def test_two_replicas_share_the_requests_and_answer_as_one_server(cluster: Cluster) -> None:
    assert cluster.http.get("/health").json() == {"status": "ok", "stage": "m6", "model": MODEL, "replicas": 2}
    assert cluster.http.head("/health").status_code == 200
    streams = Streams(cluster.url, 8)
    page = cluster.http.get("/metrics").text
    running = samples(page, "folovllm_requests_running")
    assert len(running) == 2 and sum(running.values()) == 8 and min(running.values()) >= 3
    assert page.count("# TYPE folovllm_requests_running gauge") == 1
    streams.join()
    assert all(body.endswith(b"data: [DONE]\n\n") for body in streams.bodies)
    assert cluster.http.get("/trace").json()["traceEvents"]


def test_errors_are_those_of_one_server(cluster: Cluster) -> None:
    assert error_of(cluster.http.post("/v1/completions", json={**SHORT, "best": 1}), 400)["param"] == "best"
    assert error_of(cluster.http.post("/v1/completions", json={**SHORT, "model": "other"}), 404)
    assert error_of(cluster.http.get("/nothing"), 404)
    big = cluster.http.post("/v1/completions", content=b" " * (1 << 21), headers={"Content-Type": "application/json"})
    assert error_of(big, 413)["code"] == "body_too_large"
    foreign = cluster.http.get("/health", headers={"Host": "example.com"})
    assert error_of(foreign, 400)["code"] == "host_not_allowed"


def test_requests_with_one_beginning_go_to_one_replica(cluster: Cluster) -> None:
    """And those of another salt elsewhere, at the latest when there are many."""
    prompt = "the same beginning " * 60
    used: dict[str, set[str]] = {}
    for salt in ("a", "b", "c", "d", "e", "f"):
        for ending in ("one", "two", "three"):
            ids = [ord(c) % 250 for c in prompt + ending]
            body = {**SHORT, "prompt": ids, "cache_salt": salt}
            response = cluster.http.post("/v1/completions", json=body)
            used.setdefault(salt, set()).add(response.headers["x-replica"])
            cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 500) == (ending != "one")
    assert all(len(replicas) == 1 for replicas in used.values())
    assert len(set.union(*used.values())) == 2


def test_a_client_that_leaves_aborts_its_request(cluster: Cluster) -> None:
    with cluster.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 1900}) as response:
        next(response.iter_bytes())

    def aborted() -> bool:
        page = cluster.http.get("/metrics").text
        counts = re.findall(r'^folovllm_requests_total{outcome="abort",replica="\w+"} (\S+)$', page, re.M)
        return sum(map(float, counts)) >= 1 and set(samples(page, "folovllm_requests_running").values()) == {0.0}

    wait_until(aborted, 10)


def test_a_replica_that_dies_loses_its_own_answers_alone(cluster: Cluster) -> None:
    pids = cluster.replicas()
    assert len(pids) == 2
    streams = Streams(cluster.url, 6)
    os.kill(min(pids), signal.SIGKILL)
    waiting = cluster.http.post("/v1/completions", json=SHORT)
    streams.join()
    ends = {name: {b.endswith(b"[DONE]\n\n") for b, r in zip(streams.bodies, streams.replica, strict=True) if r == name}
            for name in set(streams.replica)}  # fmt: skip
    assert sorted(ends.values(), key=str) == [{False}, {True}]
    lost = [body for body in streams.bodies if not body.endswith(b"[DONE]\n\n")]
    for body in lost:
        last = json.loads(body.strip().rpartition(b"data: ")[2])
        assert last["error"]["code"] == "replica_died"
    assert waiting.status_code == 200 or waiting.json()["error"]["code"] == "replica_died"
    assert cluster.http.get("/health").status_code == 200
    wait_until(lambda: cluster.http.get("/health").json()["replicas"] == 2, 100)
    assert set(cluster.replicas()) - set(pids)


def test_a_signal_lets_open_answers_finish(cluster: Cluster) -> None:
    """The last test of this cluster."""
    streams = Streams(cluster.url, 2)
    os.kill(cluster.process.pid, signal.SIGTERM)
    wait_until(lambda: cluster.http.get("/health").status_code == 503, 10)
    assert cluster.http.get("/health").json()["status"] == "draining"
    assert error_of(cluster.http.post("/v1/completions", json=SHORT), 503)["code"] == "shutting_down"
    streams.join()
    assert all(body.endswith(b"data: [DONE]\n\n") for body in streams.bodies)
    before = _children(cluster.process.pid)
    assert cluster.process.wait(60) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in before), 30)
    assert not any("Traceback" in line for line in cluster.lines)
