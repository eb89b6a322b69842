"""Run pytest with the arguments given, and keep the outcome of a run that passed or failed in reports/test-all.txt."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "reports" / "test-all.txt"


def main() -> int:
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode in (0, 1):  # anything else is no run: interrupted, or called wrongly
        write_report(lines)
    return process.returncode


def write_report(lines: list[str]) -> None:
    """When, which commit, on what, and what pytest said at its end."""
    notable = [line for line in lines if line.startswith(("coverage:", "FAILED", "ERROR", "SKIPPED"))]
    facts = [
        f"date      {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"commit    {commit()}",
        f"machine   {processor()}, {os.cpu_count()} cores",
        f"python    {platform.python_version()}",
        *notable,
        lines[-1].strip("= ") if lines else "",
    ]
    temporary = REPORT.with_suffix(".tmp")
    temporary.write_text("\n".join(facts) + "\n", encoding="utf-8")
    os.replace(temporary, REPORT)


def commit() -> str:
    try:
        git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
