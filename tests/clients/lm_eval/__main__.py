"""lm_eval against m6 and m7, on questions of our own: what do 4 bits cost?

`python -m tests.clients.lm_eval --python OTHER/bin/python`: of an environment with `lm_eval[api]` and `transformers`.

Both stages answer the same questions (`items.py`), so that they are compared question by question; the numbers are
comparable with no published ones. The weights of the embedded model come from a file in 4 bits, in groups of 32 as
those of m7: quantising them again costs less than it would cost a model that was trained in 16 bits and kept there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from common.config import DEFAULT_MODEL
from common.errors import UserError, require
from common.models import load_tokenizer
from tests.clients.lm_eval.items import CHOICES, FOLDER, QUOTES, ROOT
from tests.serving.running import Process

STAGES = {"m6": "m6_prefix_caching", "m7": "m7_gptq"}
SCORES = {CHOICES.stem: "acc", QUOTES.stem: "exact_match"}
"""By task: what decides whether a question was answered rightly."""
LIBRARIES = ("lm_eval", "datasets", "transformers", "torch")
NOTE = "The embedded model's weights come from a 4-bit grid in groups of 32, which is also m7's. Our own questions."
WIDTH = 8  # prompts in a request


def run_stage(python: str, stage: str, limit: int | None) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """The scores of a stage by task, and for each task which of its questions were answered rightly."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        folder.mkdir()
        tokenizer = load_tokenizer(DEFAULT_MODEL)
        require(tokenizer is not None, f"{DEFAULT_MODEL} has no tokenizer")
        tokenizer.save(folder)  # type: ignore[union-attr]
        server = Process("--model", DEFAULT_MODEL, "--dtype", "auto", stage=STAGES[stage], stderr=subprocess.DEVNULL)
        try:
            begun = time.perf_counter()
            _lm_eval(python, server.url, folder, Path(scratch) / "out", limit)
            seconds = time.perf_counter() - begun
            samples = server.http.get("/metrics").text
        finally:
            server.kill()
        scores, right = read_results(Path(scratch) / "out")
    counted = {line.split()[0]: float(line.split()[-1]) for line in samples.splitlines() if line[:1] not in ("#", "")}
    tokens = {kind: counted.get(f"folovllm_{kind}_tokens_total") for kind in ("prompt", "generation")}
    return {**scores, "seconds": round(seconds, 1), "tokens": tokens}, right


def _lm_eval(python: str, url: str, tokenizer: Path, output: Path, limit: int | None) -> None:
    """The usual command line. No hub is asked: questions and tokenizer are files."""
    of_model = f"model={DEFAULT_MODEL},base_url={url}/v1/completions,tokenizer={tokenizer},max_length=2048"
    of_model += ",tokenizer_backend=huggingface,num_concurrent=1,max_retries=1"
    command = [python, "-P", "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", of_model]
    command += ["--include_path", str(FOLDER), "--tasks", ",".join(SCORES), "--batch_size", str(WIDTH)]
    command += ["--output_path", str(output), "--log_samples", *(["--limit", str(limit)] if limit else [])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    try:
        status = subprocess.run(command, cwd=ROOT, env=os.environ | offline).returncode
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}") from None
    require(status == 0, f"lm_eval ended with status {status}: does {python} have lm_eval[api] and transformers?")


def read_results(output: Path) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    [path] = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    scores = {
        task: {name: value for name, value in results[task].items() if isinstance(value, int | float)}
        for task in SCORES
    }
    right: dict[str, list[bool]] = {}
    for task, score in SCORES.items():
        [path] = output.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        answers = {line["doc_id"]: bool(line[score]) for line in lines if line["filter"] in ("none", "exact")}
        right[task] = [answers[number] for number in sorted(answers)]
    return scores, right


def compare(first: list[bool], second: list[bool]) -> dict[str, Any]:
    """Question by question; the difference of the shares, and its standard error, which is that of pairs."""
    pairs, count = Counter(zip(first, second, strict=True)), len(first)
    lost, gained = pairs[True, False], pairs[False, True]
    difference = (gained - lost) / count
    error = math.sqrt(max(0.0, (gained + lost) / count - difference**2) / count)
    return {
        "both": pairs[True, True], "only_m6": lost, "only_m7": gained, "neither": pairs[False, False],
        "m7_minus_m6": difference, "stderr": error,
    }  # fmt: skip


def versions(python: str) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {LIBRARIES}}}))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}") from None
    require(found.returncode == 0, f"{python} lacks {' or '.join(LIBRARIES)}: pip install 'lm_eval[api]' transformers")
    return json.loads(found.stdout)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.lm_eval", description="lm_eval against m6 and m7.")
    parser.add_argument("--python", required=True, help="of an environment with lm_eval[api] and transformers")
    parser.add_argument("--limit", type=int, help="questions of each kind (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "reports/serving/lm_eval.json")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"model": DEFAULT_MODEL, "note": NOTE, "lm_eval": versions(options.python)}
    right: dict[str, dict[str, list[bool]]] = {}
    for stage in STAGES:
        found[stage], right[stage] = run_stage(options.python, stage, options.limit)
    found["questions"] = {task: len(right["m6"][task]) for task in SCORES}
    found["compared"] = {task: compare(right["m6"][task], right["m7"][task]) for task in SCORES}
    options.output.write_text(json.dumps(found | environment(), indent=1) + "\n")
    print(json.dumps({stage: found[stage] for stage in STAGES} | {"compared": found["compared"]}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
