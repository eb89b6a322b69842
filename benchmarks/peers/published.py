"""Engines measured apart on a GPU, with settings of their own (reports/peers/*.json), as rows beside the stages."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.compare import Results
from benchmarks.environment import ROOT
from benchmarks.record import Record

FOLDER = ROOT / "reports/peers"
GREEDY = "\n(greedy)"
SAME = {"nano": ("nano", None), "decode": ("decode", 64), "decode_one": ("decode", 1)}
"""A workload here, on a GPU: that of the file, and its batch."""


def peer_records(results: Results, workload: str) -> list[Record]:
    """Of the same GPU, model and workload; greedy, as the stages run, and where there is no greedy run the other."""
    name, batch = SAME.get(workload, (None, None))
    found: list[Record] = []
    for path in sorted(FOLDER.glob("*.json")) if name and results.config["model"] == "random:qwen3-0.6b" else ():
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["environment"]["gpu"] != results.environment["hardware"].get("gpu"):
            continue
        runs: list[dict[str, Any]] = [r for r in values["results"] if (r["workload"], r.get("batch")) == (name, batch)]
        for engine, about in values["engines"].items():
            mine = [r for r in runs if r["engine"] == engine]
            temperature = min((r["temperature"] for r in mine), default=0.0)
            speeds = sorted(r["output_tokens_per_s"] for r in mine if r["temperature"] == temperature)
            if speeds:
                version = about.split(",")[0].removeprefix("commit ")
                heading = f"{engine} {version}" + (f"\n(temperature {temperature})" if temperature else GREEDY)
                median = speeds[(len(speeds) - 1) // 2]
                found.append(Record(heading, workload, output_tokens_per_s=median, output_tokens_per_s_repeats=speeds))
    return found
