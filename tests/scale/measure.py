"""Two replicas on this machine, one router at a time: what share of the prompts' tokens they have cached, and when the
first token comes. `python -m tests.scale.measure prefix --out reports/cpu/replicas.json` (or load, ray; then picture).

shared_prefix and multi_turn are those of benchmarks/workloads.toml. system_prompts: eight beginnings of shared_prefix's
length at the same time, with five questions each. Clients are threads of this process, through HTTP.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.environment import environment
from benchmarks.files import write_json
from benchmarks.recipes import BenchRequest
from benchmarks.workloads import find_size
from common.config import EngineConfig
from common.models.load import open_source, read_tokenizer
from common.scale.serve import application, cluster, share

MODEL, PORT = "smollm2-135m-instruct", 8911
BUILD = "stages.m6_prefix_caching.engine:build"
ROUTERS = {
    "prefix": "common.scale.router.PrefixRouter",
    "load": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "ray": "tests.scale.rays_router:RaysRouter",
}
PROMPTS, QUESTIONS, EVERY = 8, 5, 1.5


def requests_of(workload: str, vocab_size: int) -> list[BenchRequest]:
    if workload != "system_prompts":
        return find_size(workload, None, "cpu").requests(vocab_size, run=1 + (workload == "multi_turn"))
    chosen = [
        [one for one in find_size("shared_prefix", None, "cpu").requests(vocab_size, run=10 + i) if not one.warm]
        for i in range(PROMPTS)
    ]
    mixed = [one for group in chosen for one in group[:QUESTIONS]]
    random.Random(0).shuffle(mixed)
    return [replace(one, arrival=number * EVERY) for number, one in enumerate(mixed)]


class Client:
    """Asks in the order and at the times of a workload; a turn waits for the one before it."""

    def __init__(self, workload: str) -> None:
        source = open_source(MODEL, EngineConfig(MODEL).torch_device)
        self.tokenizer = read_tokenizer(source, None)
        assert self.tokenizer is not None
        everything = requests_of(workload, source.config.vocab_size)
        self.warm, self.timed = ([one for one in everything if one.warm is kind] for kind in (True, False))
        self.ended = [threading.Event() for _ in self.timed]
        self.tokens: list[list[int]] = [[] for _ in self.timed]
        self.rows: list[dict[str, Any]] = [{} for _ in self.timed]

    def run(self) -> list[dict[str, Any]]:
        for one in self.warm:
            self.ask(one.prompt, one.max_tokens)
        self.start = time.perf_counter()
        threads = [threading.Thread(target=self.one, args=(number,)) for number in range(len(self.timed))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.rows

    def one(self, number: int) -> None:
        request = self.timed[number]
        prompt, begin = request.prompt, self.start
        if request.follows is not None:
            self.ended[request.follows].wait()
            prompt, begin = self.tokens[request.follows][: request.keep] + prompt, time.perf_counter()
        time.sleep(max(0.0, begin + request.arrival - time.perf_counter()))
        row, answer = self.ask(prompt, request.max_tokens)
        self.rows[number], self.tokens[number] = row, prompt + answer
        self.ended[number].set()

    def ask(self, prompt: list[int], max_tokens: int) -> tuple[dict[str, Any], list[int]]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        connection, asked = http.client.HTTPConnection("127.0.0.1", PORT), time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text, first, usage = "", 0.0, {}
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                piece = json.loads(line[6:])
                text += "".join(choice["text"] for choice in piece["choices"])
                usage = piece.get("usage") or usage
        assert response.status == 200 and usage, (response.status, text)
        assert self.tokenizer is not None
        row = {
            "replica": response.headers["x-replica"],
            "ttft_s": first - asked,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        }
        return row, self.tokenizer.encode(text, add_special_tokens=False)


def summary(router: str, workload: str, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    times = sorted(row["ttft_s"] for row in rows)
    return {
        "router": router,
        "workload": workload,
        "requests": len(rows),
        "seconds": seconds,
        "hit_rate": sum(row["cached_tokens"] for row in rows) / sum(row["prompt_tokens"] for row in rows),
        "ttft_p50_s": statistics.median(times),
        "ttft_p90_s": times[int(0.9 * (len(times) - 1))],
        "ttft_mean_s": statistics.fmean(times),
        "requests_by_replica": sorted(Counter(row["replica"] for row in rows).values()),
        "ttfts_s": times,
    }


def measure(router: str) -> list[dict[str, Any]]:
    config = EngineConfig(MODEL, dtype="bf16", max_num_seqs=8, max_model_len=2048)
    found = []
    with cluster(config):
        replica: dict[str, Any] = {"ray_actor_options": share(2, config)[1]}
        replica["request_router_config"] = {"request_router_class": ROUTERS[router]}
        args = {"build": BUILD, "engine": asdict(config), "server": {"replicas": 2}, "replica": replica}
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(args), name="folovllm", route_prefix="/")
        for workload in ("shared_prefix", "multi_turn", "system_prompts"):
            begun = time.perf_counter()
            rows = Client(workload).run()
            found.append(summary(router, workload, rows, time.perf_counter() - begun))
            print({name: value for name, value in found[-1].items() if name != "ttfts_s"}, flush=True)
        serve.shutdown()
    return found


def picture(results: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot, rc_context

    from benchmarks.environment import short_hardware
    from benchmarks.style import INK, RC, WIDTH

    names = {"prefix": "prefix-aware", "load": "power of two choices", "ray": "Ray's prefix router"}
    colors = {"prefix": "#66AADD", "load": "#B8B8B8", "ray": "#606060"}
    workloads = list(dict.fromkeys(row["workload"] for row in results["rows"]))
    rows = {(row["router"], row["workload"]): row for row in results["rows"]}
    routers = [router for router in names if any(key[0] == router for key in rows)]
    with rc_context(RC):
        figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 4.2))
        panels = (("hit_rate", 100, "prompt tokens from the cache, %"), ("ttft_p50_s", 1000, "first token, median, ms"))
        for axis, (field, scale, label) in zip(axes, panels, strict=True):
            for number, router in enumerate(routers):
                values = [scale * rows[router, workload][field] for workload in workloads]
                places = [index + 0.27 * (number - 1) for index in range(len(workloads))]
                bars = axis.bar(places, values, 0.25, color=colors[router], label=names[router])
                axis.bar_label(bars, fmt="%.0f", fontsize=11, color=INK)
            axis.set_xticks(range(len(workloads)), workloads)
            axis.set_ylabel(label)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
        where = f"m6, {MODEL}, bf16, {short_hardware(results['environment'], 'cpu')}: two replicas, one run each"
        figure.text(0.01, -0.04, where, color=INK, fontsize=11)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("router", choices=("prefix", "load", "ray", "picture"))
    parser.add_argument("--out", type=Path, default=Path("reports/local/replicas.json"))
    arguments = parser.parse_args()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"schema": "replicas-1", "rows": []}
    if arguments.router == "picture":
        picture(kept, arguments.out.with_suffix(".png"))
        return
    rows = [row for row in kept["rows"] if row["router"] != arguments.router] + measure(arguments.router)
    config = {"model": MODEL, "dtype": "bf16", "device": "cpu", "stage": "m6", "replicas": 2, "ray": ray.__version__}
    write_json(arguments.out, {"schema": "replicas-1", "environment": environment(), "config": config, "rows": rows})


if __name__ == "__main__":
    main()
