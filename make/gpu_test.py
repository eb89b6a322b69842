"""Run the GPU's tests in several processes: most of their time is Triton's compiler, which has one thread in each."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 8
TAIL = 30
"""Lines of a share that failed: they hold the reasons, see tests/summary.py."""
NO_TEST = 5  # pytest's status
COUNTS = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU: PyTorch sees none here, so nothing was tested")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares, began = max(1, min(MOST, cpus // 2)), time.perf_counter()
    print(f"{shares} processes side by side; the last line of each follows when it ends", flush=True)
    counts, tested, tails = Counter[str](), False, list[str]()
    with ThreadPoolExecutor(shares) as pool:
        for done in as_completed([pool.submit(run, share, shares) for share in range(shares)]):
            ended = done.result()
            lines = ended.stdout.strip().splitlines() or [f"no output, status {ended.returncode}"]
            print(last := lines[-1], flush=True)
            tested |= ended.returncode != NO_TEST
            if ended.returncode not in (0, NO_TEST):
                tails.append("\n".join(lines[-TAIL:]))
            for number, what in COUNTS.findall(last):
                counts[what.rstrip("s")] += int(number)
    for tail in tails:
        print(f"==== a share that failed, its last lines ====\n{tail}")
    total = ", ".join(f"{counts[what]} {what}" for what in ("failed", "passed", "skipped", "error") if counts[what])
    print(f"==== {total if tested else 'no test ran'} in {time.perf_counter() - began:.0f} s ====")
    return int(bool(tails) or not tested)


def run(share: int, shares: int) -> subprocess.CompletedProcess[str]:
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "--share", f"{share}/{shares}"]
    command, both = [*tests, *sys.argv[1:]], subprocess.STDOUT
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=both, text=True, errors="replace")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
