"""Run the GPU's tests in several processes: most of their time is Triton's compiler, which has one thread in each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 8
COUNTS = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU: PyTorch sees none here, so nothing was tested")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares, began = max(1, min(MOST, cpus // 2)), time.perf_counter()
    print(f"{shares} processes side by side; what each says follows when it ends", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as folder:
        logs = [Path(folder) / f"{share}.log" for share in range(shares)]
        running = {share: start(share, shares, log) for share, log in enumerate(logs)}
        failed = False
        try:
            while running:
                time.sleep(0.2)
                for share in [share for share, process in running.items() if process.poll() is not None]:
                    status = running.pop(share).returncode
                    failed |= status not in (0, 5)  # 5: none of the tests fell to it
                    text = logs[share].read_text(errors="replace")
                    print(text if status not in (0, 5) else text.strip().splitlines()[-1], flush=True)
        finally:
            for process in running.values():
                process.kill()
        counts = Counter[str]()
        for log in logs:
            for number, what in COUNTS.findall(log.read_text(errors="replace").strip().splitlines()[-1]):
                counts[what.rstrip("s")] += int(number)
    total = ", ".join(f"{counts[what]} {what}" for what in ("failed", "passed", "skipped", "error") if counts[what])
    print(f"==== {total} in {time.perf_counter() - began:.0f} s ====")
    return int(failed)


def start(share: int, shares: int, log: Path) -> subprocess.Popen[bytes]:
    command = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "--share", f"{share}/{shares}", *sys.argv[1:]]
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
