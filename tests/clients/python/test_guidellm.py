"""guidellm, a load generator, at 1 to 128 streams. What it counted is kept; speeds of a busy machine prove nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOKENIZER = os.environ.get("FOLOVLLM_TOKENIZER", "")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("streams", [1, 8, 32, 128])
def test_streams(
    url: str, model: str, streams: int, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    report, count = tmp_path / "report.json", max(4, streams)
    command = [sys.executable, "-P", "-m", "guidellm", "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model={model}"]
    command += ["--profile", f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_requests,count={count}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--output", f"kind=json,path={report}"]
    result = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    [run] = json.loads(report.read_text())["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert totals["successful"] == count and not totals["errored"], totals
    for short, name in {"requests_per_s": "requests_per_second", "tokens_per_s": "output_tokens_per_second"}.items():
        record_property(short, json.dumps(round(run["metrics"][name]["successful"]["mean"], 2)))
    for short, name in {"ttft_ms": "time_to_first_token_ms", "itl_ms": "inter_token_latency_ms"}.items():
        record_property(short, json.dumps(round(run["metrics"][name]["successful"]["median"], 1)))
