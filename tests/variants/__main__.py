"""Make every variant, and let m6 generate from it in a process of its own."""

import importlib
import pkgutil
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tests.variants
from tests.variants import VARIANTS, Variant

SECONDS = 30.0
SPARE = 64 << 20
"""Bytes that a refused model may take above a process that has imported the loaders."""

LOAD = """
import resource, sys
from common.errors import UserError
from common.models.load import load_for
from common.models.sources import gguf_file
from common.config import EngineConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_for(EngineConfig(model=sys.argv[1], device="cpu"))
except UserError as error:
    print(error, file=sys.stderr)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def main(root: Path, beginnings: list[str]) -> int:
    for module in pkgutil.iter_modules(tests.variants.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.variants.{module.name}")
    names = [name for name in VARIANTS if not beginnings or name.startswith(tuple(beginnings))]
    failed = [name for name in names if not _try(root, name, VARIANTS[name])]
    print(f"{len(names) - len(failed)} of {len(names)} as expected", *failed, sep="\n  ")
    return int(bool(failed) or not names)


def _try(root: Path, name: str, variant: Variant) -> bool:
    folder = Path(tempfile.mkdtemp(prefix=re.sub(r"\W+", "-", name)[:40] + "-", dir=root))
    model = str(variant.make(folder))
    command = ["-m", "stages.m6_prefix_caching", "generate", "--model", model, "--max-tokens", "8"]
    status, seconds, said = _run([*command, *(variant.options or ("The capital of France is",))])
    right = status == (0 if variant.refused is None else 2) and "Traceback" not in said
    note = ""
    if variant.refused is not None:
        right = right and len(said.strip().splitlines()) == 1 and re.search(variant.refused, said) is not None
        _, loading, memory = _run(["-c", LOAD, model])
        taken = int(memory.split()[-1])
        right = right and taken <= SPARE
        note = f", {taken >> 20} MiB, {loading:.1f} s with imports"
    print(
        f"{'ok  ' if right else 'FAIL'} {name}: status {status}, {seconds:.1f} s{note}: {said.strip()[:300]}",
        flush=True,
    )
    return right


def _run(arguments: list[str]) -> tuple[int, float, str]:
    """Exit status, seconds, and what it printed on both streams. Memory is limited, or a mistake takes the machine."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=SECONDS, preexec_fn=_limit
        )
    except subprocess.TimeoutExpired:
        return -1, SECONDS, f"no answer within {SECONDS:.0f} s 0"
    return done.returncode, time.perf_counter() - start, done.stderr + done.stdout


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m tests.variants FOLDER [NAME ...]")
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    sys.exit(main(where, sys.argv[2:]))
