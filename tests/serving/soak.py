"""Clients of every bad kind at once, next to good ones: `python -m tests.serving.soak --seconds 600 --output FILE`.

The server is a process of its own with short limits. Good clients must always be answered, memory must stay as it was
in the second quarter, no limit may be passed, and at the end nothing may be left. In bfloat16, because there PyTorch
keeps what it has prepared for each length of a prompt.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.environment import environment
from tests.serving.running import TINY, Process, client_of

LIMITS = {"max-connections": 60, "header-timeout": 2, "body-timeout": 2, "read-timeout": 2, "keep-alive": 2}
MIB = 2**20
LENGTHS = 300  # of prompts
MOST_GROWTH = 16  # MiB


class Soak:
    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.seen[what] += 1

    def connect(self, timeout: float = 10) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=timeout)

    # -- the kinds -------------------------------------------------------------------------------------------------

    def good(self, random: Random) -> None:
        body = body_of(random)
        with client_of(self.url) as client:
            response = client.post("/v1/completions", json=body)
        whole = response.text.endswith("data: [DONE]\n\n") if body["stream"] else bool(response.json()["choices"])
        if response.status_code != 200 or not whole:
            self.failures.append(f"{response.status_code}: {response.text[-300:]}")

    def silent(self, random: Random) -> None:
        with self.connect() as client:
            assert client.recv(1) in (b"", b"H")  # let go, or refused where all others are busy

    def slow(self, random: Random) -> None:
        """A byte of a header or of a body each tenth of a second."""
        opening = request(body_of(random))[: random.choice([30, 200])]
        with self.connect() as client:
            client.sendall(opening)
            while time.monotonic() < self.end:
                client.sendall(b"x")
                time.sleep(0.1)

    def vanishing(self, random: Random) -> None:
        """Leaves in the middle of its request or of the answer, in half of the cases with a reset."""
        message = request(body_of(random) | {"max_tokens": 100})
        with self.connect() as client:
            client.sendall(message[: random.choice([10, len(message) - 5, len(message)])])
            if random.random() < 0.5:
                client.recv(100)
            if random.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def deaf(self, random: Random) -> None:
        """Asks for much and reads nothing."""
        with self.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            for _ in range(8):
                client.sendall(request(body_of(random) | {"n": 4, "logprobs": 5, "stream": True, "max_tokens": 200}))
            time.sleep(3)

    def malformed(self, random: Random) -> None:
        whole = request(body_of(random))
        at = random.randrange(len(whole))
        message = random.choice(
            [
                random.randbytes(300) + b"\r\n\r\n",
                whole[:at] + random.randbytes(5) + whole[at:],
                whole.replace(b"Content-Length: ", b"Content-Length: -"),
                b"GET / HTTP/1.1\r\nX: " + b"y" * 200_000,
                whole.replace(b"{", b"[", 1),
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            ]
        )
        with self.connect() as client:
            client.sendall(message)
            client.settimeout(5)
            client.recv(1000)
        time.sleep(0.05)

    # -- all together ----------------------------------------------------------------------------------------------

    def work(self, kind: str, number: int) -> None:
        random, one = Random(f"{kind}-{number}"), getattr(self, kind)
        while time.monotonic() < self.end:
            try:
                one(random)
            except OSError:  # it is let go, or finds no room
                assert kind != "good"
            except Exception as error:
                self.failures.append(f"{kind}: {error!r}")
            self.count(kind)

    def run(self, clients: dict[str, int], sample: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
        started = time.monotonic()
        threads = [
            threading.Thread(target=self.work, args=(kind, number), daemon=True)
            for kind, count in clients.items()
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        samples: list[dict[str, float]] = []
        every = max(0.5, (self.end - started) / 60)
        while time.monotonic() < self.end:
            time.sleep(every)
            samples.append({"seconds": round(time.monotonic() - started, 1), **sample()})
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a client is still being kept"
        return samples


def body_of(random: Random) -> dict[str, Any]:
    prompt = [random.randrange(200) for _ in range(random.randrange(1, LENGTHS))]
    tokens = random.choice([1, 5, 30])
    return {"model": TINY, "prompt": prompt, "max_tokens": tokens, "stream": random.random() < 0.5}


def request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def figures(url: str) -> dict[str, float]:
    with client_of(url) as client:
        page = client.get("/metrics").text
    names = {
        "folovllm_connections": "connections",
        "process_open_fds": "descriptors",
        "process_resident_memory_bytes": "resident_mib",
    }
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.partition(" ")[0] in names)
    return {
        short: round(float(values[name]) / (MIB if short == "resident_mib" else 1), 1) for name, short in names.items()
    }


def soak(seconds: float, dtype: str = "bf16") -> dict[str, Any]:
    """What happened; `growth_mib`: median memory of the last quarter against that of the second one, where there are
    enough samples."""
    limits = (text for name, value in LIMITS.items() for text in (f"--{name}", str(value)))
    process = Process("--dtype", dtype, *limits, stderr=None)
    try:
        run = Soak(process.url, seconds)
        clients = {"good": 3, "silent": 40, "slow": 10, "vanishing": 3, "deaf": 3, "malformed": 3}
        samples = run.run(clients, lambda: figures(process.url))
        last = figures(process.url)
        while last["connections"] > 1 and time.monotonic() < run.end + 40:  # its own
            time.sleep(0.2)
            last = figures(process.url)
        process.process.terminate()
        status = process.process.wait(60)
    finally:
        process.kill()
    quarter = len(samples) // 4
    memory = [sample["resident_mib"] for sample in samples]
    growth = None
    if quarter:
        growth = round(statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter]), 1)
    return {
        "seconds": seconds,
        "dtype": dtype,
        "limits": LIMITS,
        "clients": clients,
        "requests": dict(run.seen),
        "failures": run.failures[:20],
        "growth_mib": growth,
        "most_connections": max((sample["connections"] for sample in samples), default=None),
        "at_the_end": last,
        "exit_status": status,
        "environment": environment(),
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = soak(arguments.seconds)
    rows = ",\n  ".join(json.dumps(sample) for sample in result.pop("samples"))
    text = json.dumps(result, indent=1)[:-2] + f',\n "samples": [\n  {rows}\n ]\n}}\n'
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(json.dumps(result, indent=1), *problems(result), sep="\n")
    sys.exit(bool(problems(result)))


def problems(result: dict[str, Any]) -> list[str]:
    """What was not as it has to be."""
    growth, most, last = result["growth_mib"], result["most_connections"], result["at_the_end"]["connections"]
    found = {
        "good clients failed": bool(result["failures"]),
        f"memory grew by {growth} MiB": growth is not None and growth > MOST_GROWTH,
        f"{most} connections were open": most is not None and most > result["limits"]["max-connections"],
        f"{last} connections were left": last != 1,  # the one that asks
        f"the server ended with {result['exit_status']}": result["exit_status"] != 0,
    }
    return [what for what, holds in found.items() if holds]


if __name__ == "__main__":
    main()
