"""A batch of short lines on a tiny model: how fast, and how much memory the process takes while it answers.
`python -m tests.scale.measure_batch --out reports/cpu/batch.json`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.files import write_json

MODEL, STAGE, MAX_TOKENS = "random:tiny-llama", "m6", 2
PROMPT = 4  # tokens
SAMPLES = 20  # of the memory, evenly over the answers


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            prompt = [number // 200**place % 200 for place in range(PROMPT)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def memory(pid: int) -> int:
    """Bytes that are in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_lines(source, count)
        command = [sys.executable, "-m", "stages.m6_prefix_caching", "batch", "--model", MODEL, "--device", "cpu"]
        begun, rows = time.perf_counter(), []
        process = subprocess.Popen([*command, str(source), str(target)])
        with Path("/dev/null").open("rb") as nothing:
            answers, done = nothing, 0
            while process.poll() is None:
                if answers is nothing and target.exists():
                    answers = target.open("rb")
                done += answers.read().count(b"\n")
                with_memory = memory(process.pid)
                if done and with_memory:
                    rows.append({"seconds": time.perf_counter() - begun, "answers": done, "memory_bytes": with_memory})
                time.sleep(0.1)
        seconds = time.perf_counter() - begun
        found = [json.loads(line) for line in target.open()]
        assert process.returncode == 0 and len(found) == count
        assert all(one["custom_id"] == f"line-{number}" for number, one in enumerate(found))
        sizes = {"requests_bytes": source.stat().st_size, "answers_bytes": target.stat().st_size}
        failed = sum(one["response"]["status_code"] != 200 for one in found)
    wanted = [count * number / SAMPLES for number in range(1, SAMPLES + 1)]
    kept = [min(rows, key=lambda row: abs(row["answers"] - place)) for place in wanted]
    peak = max(row["memory_bytes"] for row in rows)
    return {
        "lines": count, "failed": failed, "seconds": seconds, "lines_per_s": count / seconds, **sizes,
        "memory_peak_bytes": peak, "memory": kept,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("reports/local/batch.json"))
    arguments = parser.parse_args()
    row = measure(arguments.lines)
    config = {"model": MODEL, "device": "cpu", "stage": STAGE, "prompt_tokens": PROMPT, "max_tokens": MAX_TOKENS}
    write_json(arguments.out, {"schema": "batch-1", "environment": environment(), "config": config, **row})
    print({name: value for name, value in row.items() if name != "memory"})


if __name__ == "__main__":
    main()
