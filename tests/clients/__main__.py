"""Real clients against servers of three stages: `make clients`, which installs them.

`python -m tests.clients build/clients`: the folder of the clients' environments. Writes what passed, what failed and
why to reports/serving/clients.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from common.config import DEFAULT_MODEL
from common.errors import UserError, require
from common.models import load_tokenizer
from tests.serving.running import ROOT, Process

FOLDER = ROOT / "tests/clients"
STAGES = {"m6": "m6_prefix_caching", "m1": "m1_kv_cache", "m7": "m7_gptq"}
MEMORY = str(800 * 2**20)  # of each server's KV cache
CLIENTS = {  # tests: the environment and the packages
    "openai": ("agents", ["openai"]),
    "langchain": ("agents", ["langchain-openai", "langchain-core"]),
    "litellm": ("agents", ["litellm"]),
    "llm": ("agents", ["llm"]),
    "pydantic_ai": ("agents", ["pydantic-ai-slim"]),
    "instructor": ("structured", ["instructor", "openai"]),
    "llama_index": ("structured", ["llama-index-llms-openai-like", "llama-index-core", "openai"]),
    "guidellm": ("load", ["guidellm"]),
}
NPM = {"openai": ["openai", "zod"], "ai": ["ai", "@ai-sdk/openai-compatible", "zod"]}
SECONDS = 900  # for one client


def run_python(folder: Path, client: str, results: Path, given: dict[str, str]) -> dict[str, Any]:
    place, packages = CLIENTS[client]
    python = folder.resolve() / place / "bin/python"
    require(python.exists(), f"{python} is not there: `make clients` makes it")
    command = [str(python), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    command += ["-c", "pyproject.toml", "--rootdir", str(FOLDER), "--confcutdir", str(FOLDER / "python")]
    command += [f"--junitxml={results}", str(FOLDER / f"python/test_{client}.py")]
    subprocess.run(command, cwd=ROOT, env=os.environ | given, timeout=SECONDS)
    asked = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {packages}}}))"
    versions = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout
    return {"client": client, "versions": json.loads(versions), "cases": cases_of(results)}


def run_npm(folder: Path, client: str, results: Path, given: dict[str, str]) -> dict[str, Any]:
    """Its file, copied next to the packages, where node looks for them."""
    command = ["node", "--test", "--test-concurrency=1", "--test-reporter=junit"]
    command += [f"--test-reporter-destination={results}", f"{client}.test.mjs"]
    subprocess.run(command, cwd=folder / "npm", env=os.environ | given, timeout=SECONDS)
    packages = json.loads((folder / "npm/package-lock.json").read_text())["packages"]
    versions = {name: packages[f"node_modules/{name}"]["version"] for name in NPM[client]}
    return {"client": f"npm {client}", "versions": versions, "cases": cases_of(results)}


def cases_of(results: Path) -> list[dict[str, Any]]:
    """What a run wrote in JUnit's form; figures that a test recorded are its properties."""
    require(results.exists(), "a client ended before its tests did")
    cases: list[dict[str, Any]] = []
    for case in ElementTree.parse(results).iter("testcase"):
        broken = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        left_out = case.find("skipped")
        outcome = "passed" if broken is None and left_out is None else "skipped" if broken is None else "failed"
        found = {"case": str(case.get("name")).removeprefix("test_"), "outcome": outcome}
        found["seconds"] = round(float(case.get("time", 0)), 1)  # type: ignore[assignment]
        why = broken if broken is not None else left_out
        figures = {one.get("name"): json.loads(str(one.get("value"))) for one in case.iter("property")}
        reason = {} if why is None else {"reason": str(why.get("message"))[:500]}
        cases.append(found | reason | figures)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the clients' environments")
    parser.add_argument("--only", help="clients, separated by commas; npm's with 'npm-' before the name")
    parser.add_argument("--output", type=Path, default=ROOT / "reports/serving/clients.json")
    options = parser.parse_args()
    known = [*CLIENTS, *(f"npm-{name}" for name in NPM)]
    chosen = options.only.split(",") if options.only else known
    unknown = [name for name in chosen if name not in known]
    require(not unknown, f"no client {', '.join(unknown)}: there are {', '.join(known)}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(DEFAULT_MODEL)
        assert tokenizer is not None
        (Path(scratch) / "tokenizer").mkdir()
        tokenizer.save(Path(scratch) / "tokenizer")
        servers: dict[str, Process] = {}
        try:
            for stage, package in STAGES.items():
                words = ["--model", DEFAULT_MODEL, "--dtype", "auto", "--kv-cache-memory", MEMORY]
                words += ["--max-num-seqs", "128"]
                servers[stage] = Process(*words, stage=package, stderr=subprocess.DEVNULL)
            urls = {stage: f"{server.url}/v1" for stage, server in servers.items()}
            given = {"FOLOVLLM_SERVERS": json.dumps(urls), "FOLOVLLM_MODEL": DEFAULT_MODEL}
            given["FOLOVLLM_TOKENIZER"] = f"{scratch}/tokenizer"
            for name in chosen:
                run = run_npm if name.startswith("npm-") else run_python
                if run is run_npm and shutil.which("node") is None:
                    print(f"{name}: left out, node is not installed")
                    continue
                print(f"-- {name}", flush=True)
                found.append(run(options.folder, name.removeprefix("npm-"), Path(scratch) / f"{name}.xml", given))
        finally:
            for server in servers.values():
                server.kill()
    counts = Counter(case["outcome"] for client in found for case in client["cases"])
    head = {"date": datetime.date.today().isoformat(), "model": DEFAULT_MODEL, "stages": list(STAGES)}
    report = head | {"counts": dict(counts), "clients": found} | environment()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{dict(counts)}: {options.output}")
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
