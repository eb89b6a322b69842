"""Engines that people use, measured once on one H100 as these stages were; of them no results file was kept.

Qwen3-0.6B's shape with random weights, bfloat16, November 2026. `nano`: 256 requests, inputs and outputs uniform in
100 ... 1024; `decode_one` and `decode`: one sequence, and 64. Output tokens per second. What reading at the rate of a
copy allows does have a file, kept from `make gpu-bench`.
"""

from __future__ import annotations

from benchmarks.environment import ROOT
from benchmarks.files import read_json

GPU, MODEL = "H100", "random:qwen3-0.6b"
LIMITS = ROOT / "reports" / "h100" / "gpu-limits.json"

PEERS: dict[str, dict[str, float]] = {
    "reading at the rate of a copy allows": {
        record["workload"]: record["output_tokens_per_s"]
        for record in (read_json(LIMITS)["records"] if LIMITS.exists() else ())
    },
    "vLLM 0.26": {"nano": 17_600, "decode_one": 469, "decode": 17_000},
    "nano-vllm on FlashAttention-3": {"nano": 14_900, "decode_one": 500, "decode": 17_800},
    "transformers 5.17, continuous batching": {"nano": 11_200, "decode_one": 248, "decode": 10_000},
    "transformers 5.17, static batches": {"nano": 730},
}
WORKLOADS = ("nano", "decode_one", "decode")
SHORT = {
    "vllm": "vLLM 0.26",
    "nano-vllm": "nano-vllm on FlashAttention-3",
    "limit": "reading at the rate of a copy allows",
}
