"""Replicas on a real Ray: minutes, so only in `make test-all`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    return {found[1]: float(found[2]) for found in re.finditer(rf'^{name}{{replica="(\w+)",}} (\S+)$', page, re.M)}


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
        counts = re.findall(r'^folovllm_requests_total{replica="\w+",outcome="abort"} (\S+)$', page, re.M)
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
    wait_until(lambda: not cluster.http.post("/v1/completions", json=SHORT).is_success, 10)
    streams.join()
    assert all(body.endswith(b"data: [DONE]\n\n") for body in streams.bodies)
    before = _children(cluster.process.pid)
    assert cluster.process.wait(60) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in before), 30)
    assert not any("Traceback" in line for line in cluster.lines), "".join(cluster.lines)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """A cluster of two nodes with a CPU each, on this machine: the environment of a command that uses it."""
    from ray.cluster_utils import Cluster as Nodes

    head: dict[str, Any] = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    here = {"PYTHONPATH": str(ROOT), "RAY_SERVE_LOG_TO_STDERR": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in here.items():  # workers have it from their node
            patch.setenv(name, value)
        made = Nodes(initialize_head=True, head_node_args=head)
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield {"RAY_ADDRESS": str(made.address), "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{head['dashboard_port']}"}
        made.shutdown()


def ran(*command: str, **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def deploy(nodes: dict[str, str], folder: Path, port: int, **engine: Any) -> None:
    config = yaml.safe_load((ROOT / "common" / "scale" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["engine"] |= engine
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    ran(sys.executable, "-m", "ray.serve.scripts", "deploy", str(folder / "serve.yaml"), **nodes)


def test_a_rolling_update_loses_no_request(nodes: dict[str, str], tmp_path: Path) -> None:
    """The file in the repository, over two nodes; then with another option, while clients ask."""
    port = free_port()
    deploy(nodes, tmp_path, port)
    url = f"http://127.0.0.1:{port}"
    http = client_of(url)

    def replicas(number: int = 2) -> set[str]:
        with contextlib.suppress(Exception):
            page = http.get("/metrics")
            return set(samples(page.text, "folovllm_requests_running")) if page.is_success else set()
        return set()

    wait_until(lambda: len(replicas()) == 2, 100)
    before, found, ended = replicas(), [], threading.Event()

    def ask(number: int) -> None:
        with client_of(url) as client:
            while not ended.is_set():
                body = {**LONG, "prompt": [number, 5], "max_tokens": 30}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    text = b"".join(response.iter_bytes())
                found.append((response.status_code, text[-40:], response.headers.get("x-replica")))

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    try:
        deploy(nodes, tmp_path, port, max_num_seqs=8)
        wait_until(lambda: len(replicas()) == 2 and not replicas() & before, 150)
    finally:
        ended.set()
        for client in clients:
            client.join(60)
    assert all(status == 200 and text.endswith(b"data: [DONE]\n\n") for status, text, _ in found), found
    assert {name for _, _, name in found} >= before and len({name for _, _, name in found}) >= 3
    ran(sys.executable, "-m", "ray.serve.scripts", "shutdown", "-y", **nodes)


def test_a_batch_over_two_machines(nodes: dict[str, str], tmp_path: Path) -> None:
    """Two engines; some answers are there already, and half a line."""
    lines = [json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
                         "body": {"model": "random:tiny-llama", "prompt": [i % 200, 7], "max_tokens": 2}})
             for i in range(6000)]  # fmt: skip
    lines[4000] = "no JSON"
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "stages.m6_prefix_caching", "batch", "--model", "random:tiny-llama", "--device"]
    command += ["cpu", str(source), str(target)]
    source.write_text("\n".join(lines[:100]))
    ran(*command)
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_')
    source.write_text("\n".join(lines))
    said = ran(*command, "--ray", **nodes)
    assert "5900 answers" in said and "after 100 that were in" in said
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [one["custom_id"] for one in found] == [f"r{i}" if i != 4000 else None for i in range(6000)]
    assert [one["response"]["status_code"] for one in found] == [200 if i != 4000 else 400 for i in range(6000)]


def test_what_no_replica_can_load_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.m6_prefix_caching", "serve", "--replicas", "2", "--port", "0", "--model"]
    for model, says in (("random:none", "random:none"), (MODEL + " --max-model-len 99999", "max_model_len")):
        done = subprocess.run([*command, *model.split()], cwd=ROOT, capture_output=True, text=True, timeout=150)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and says in errors[0], done.stderr
        assert "Traceback" not in done.stderr
