"""Engines that people use, on a GPU that these stages ran on too: `reports/peers/*.json`, of the schema peers-1."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import require

SCHEMA = "peers-1"
MODEL = "random:qwen3-0.6b"  # what the jobs for a GPU run unless told otherwise, and what `SAME_MODEL` calls it
SAME_MODEL = "Qwen3-0.6B's shape, random weights, bfloat16"
SAME_WORK: dict[str, dict[str, Any]] = {
    "nano": {"workload": "nano", "seed": 0},
    "decode_one": {"workload": "decode", "batch": 1, "input_len": 128, "output_len": 512},
    "decode": {"workload": "decode", "batch": 64, "input_len": 128, "output_len": 512},
}
"""For each workload of ours the rows of a file that measured the same. (`nano`: the same distribution of lengths; ours
are other draws of it.)"""
GREEDY, SAMPLED = 0.0, 0.6  # Temperatures. The stages' own benchmarks are greedy.


@dataclass(frozen=True)
class Peers:
    """One file."""

    path: Path
    values: dict[str, Any]

    def engines(self) -> list[str]:
        return list(dict.fromkeys(row["engine"] for row in self.values["results"]))

    def title(self, engine: str) -> str:
        """`vLLM 0.26.0`, or with the commit."""
        name, bracket, rest = engine.partition(" (")
        version = self.values["engines"][name].split(",")[0].split(";")[0]
        return f"{'vLLM' if name == 'vllm' else name} {version}{bracket}{rest}"

    def speed(self, engine: str, workload: str, temperature: float) -> float | None:
        """Output tokens per second, the median of its runs; None if it was not measured. `UserError` for a name that
        the file does not have."""
        require(engine in self.engines(), f"{self.path} has no engine {engine!r}. Choose from: {self.engines()}")
        require(workload in SAME_WORK, f"peers ran no workload {workload!r}. Choose from: {', '.join(SAME_WORK)}")
        wanted = {"engine": engine, "temperature": temperature, **SAME_WORK[workload]}
        rows = [row for row in self.values["results"] if all(row.get(key) == value for key, value in wanted.items())]
        return statistics.median(row["output_tokens_per_s"] for row in rows) if rows else None


def read_peers(folder: Path, gpu: str | None) -> Peers | None:
    """The file of that GPU; None if there is none. `UserError` if it is of another schema or model, or one of two."""
    found: list[Peers] = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        require(values.get("schema") == SCHEMA, f"{path} is not of the schema {SCHEMA}: see benchmarks/report/peers.py")
        require(values["model"] == SAME_MODEL, f"{path} is of {values['model']!r}, not of {SAME_MODEL!r}")
        found += [Peers(path, values)] if values["environment"]["gpu"] == gpu else []
    require(len(found) < 2, f"{' and '.join(str(peers.path) for peers in found)} are of one GPU: keep one of them")
    return found[0] if found else None
