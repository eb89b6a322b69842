"""Run pytest with the arguments given, and keep the outcome of a run that passed or failed in reports/test-all.txt."""

import datetime
import subprocess
import sys

from benchmarks.environment import ROOT, environment
from benchmarks.files import write_atomically

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
    found = environment()
    facts = [
        f"date      {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"commit    {found['commit'] or 'unknown'}{' and changes' if found['uncommitted_changes'] else ''}",
        f"machine   {found['hardware']['cpu']}, {found['hardware']['cpu_cores']} cores",
        f"python    {found['versions']['python']}",
        *notable,
        lines[-1].strip("= ") if lines else "",
    ]
    write_atomically(REPORT, lambda scratch: scratch.write_text("\n".join(facts) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
