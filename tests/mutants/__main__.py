"""`python -m tests.mutants record` runs the suite and writes down who executes what; after that, without `record`, the
mutants run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.choose import choose
from tests.mutants.run import Outcome, check_unchanged, run_all

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "build" / "mutants"


def record() -> int:
    """The whole suite of `make test`, with coverage by test and times: about as long as `make test`."""
    RECORD.mkdir(parents=True, exist_ok=True)
    command = [
        "--cov=common",
        "--cov=stages",
        "--cov-context=test",
        "--cov-report=",
        f"--junitxml={RECORD / 'junit.xml'}",
    ]
    environment = os.environ | {"COVERAGE_FILE": str(RECORD / "coverage")}
    return subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, env=environment, check=False).returncode


def mutants(arguments: argparse.Namespace) -> int:
    chosen = choose(ROOT, arguments.coverage, arguments.junit, arguments.count, arguments.only)
    choices = chosen.choices
    if chosen.unseen:
        print(f"no mutant, as no test executes one: {', '.join(chosen.unseen)}")
    if chosen.no_turn:
        print(f"no mutant, as --count is {arguments.count}: {', '.join(chosen.no_turn)}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        if fails := check_unchanged(ROOT, Path(scratch), choices, arguments.jobs):
            print(f"error: without a mutation fails {fails}", file=sys.stderr)
            return 2
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, Progress(*columns) as progress:
        bar = progress.add_task("mutants", total=len(choices))

        def tell(outcome: Outcome) -> None:
            outcomes.append(outcome)
            mutant = outcome.choice.mutant
            name = mutant.path.relative_to(ROOT)
            verdict = f"caught by {outcome.caught_by}" if outcome.caught_by else f"SURVIVED {outcome.note}"
            line = f"{outcome.seconds:5.0f} s  {name}:{mutant.line}  {mutant.what}  {verdict}"
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.advance(bar)

        run_all(ROOT, Path(scratch), choices, arguments.jobs, tell)
    minutes = (time.perf_counter() - began) / 60
    caught, total = Counter[str](), Counter[str]()
    for outcome in outcomes:
        total[outcome.choice.area] += 1
        caught[outcome.choice.area] += outcome.caught_by is not None
    print(f"\n{sum(caught.values())} of {sum(total.values())} caught in {minutes:.1f} minutes")
    print("\n".join(f"  {area:10} {caught[area]} of {total[area]}" for area in total))
    survivors = sorted(
        (o for o in outcomes if not o.caught_by), key=lambda o: (o.choice.area, str(o.choice.mutant.path))
    )
    print("survivors:" if survivors else "no survivors")
    for outcome in survivors:
        mutant = outcome.choice.mutant
        print(f"  {mutant.path.relative_to(ROOT)}:{mutant.line}  {mutant.what}  {outcome.note}")
    if arguments.json:
        rows = [
            {
                "area": o.choice.area,
                "file": o.choice.mutant.path.relative_to(ROOT).as_posix(),
                "line": o.choice.mutant.line,
                "what": o.choice.mutant.what,
                "caught_by": o.caught_by,
                "tests": len(o.choice.tests),
                "seconds": round(o.seconds, 1),
                "note": o.note,
            }
            for o in sorted(outcomes, key=lambda o: (o.choice.area, str(o.choice.mutant.path), o.choice.mutant.key))
        ]
        arguments.json.write_text(json.dumps({"minutes": round(minutes, 1), "mutants": rows}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["record", "run"], default="run")
    parser.add_argument("--count", type=int, default=12, help="mutants in each of the six areas")
    parser.add_argument("--only", default="", help="only those in files whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    parser.add_argument("--coverage", type=Path, default=RECORD / "coverage")
    parser.add_argument("--junit", type=Path, default=RECORD / "junit.xml")
    parser.add_argument("--json", type=Path, help="also write the outcomes there")
    arguments = parser.parse_args()
    if arguments.what == "record":
        return record()
    for path in (arguments.coverage, arguments.junit):
        if not path.exists():
            print(f"error: {path} is not there: run `python -m tests.mutants record` first", file=sys.stderr)
            return 2
    return mutants(arguments)


if __name__ == "__main__":
    sys.exit(main())
