"""Which mutants, and for each the tests that execute its line: from a run of the suite that wrote both down."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

from tests.coverage import COMPILED
from tests.mutants.mutate import Mutant, mutants_of

AREAS = {
    "scheduler": ["common/scheduler.py", "common/queue.py", "stages/*/scheduler.py", "stages/*/chunk_size.py",
                  "stages/*/preemption.py"],
    "caches": ["common/kv_cache.py", "stages/*/kv_cache.py", "stages/*/block_pool.py", "stages/*/*_index.py"],
    "sampler": ["common/sampler.py", "common/sampling_params.py"],
    "kernels": ["common/execution/?pu/*.py", "stages/*/fast/**/*.py"],
    "loaders": ["common/models/**/*.py", "common/text/tokenizer.py"],
    "server": ["common/serving/*.py"],
}  # fmt: skip
"""Patterns of the files in which faults are made."""


@dataclass(frozen=True)
class Choice:
    area: str
    mutant: Mutant
    tests: tuple[str, ...]
    """Node ids, the fastest first."""


@dataclass(frozen=True)
class Chosen:
    choices: list[Choice]
    unseen: list[str]
    """Files with mutants, but none on a line that some test executes."""
    no_turn: list[str]
    """Files that would have some: others had their turn first."""


def choose(root: Path, coverage_file: Path, junit_file: Path, count: int, only: str = "") -> Chosen:
    """`count` mutants of each area, spread over its files, on lines that some test executes. only: in file names."""
    covered = Contexts(root, coverage_file)
    times = durations(junit_file)
    chosen: list[Choice] = []
    usable_of: dict[str, bool] = {}
    for area, patterns in AREAS.items():
        paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
        files: list[list[Choice]] = []
        for path in paths:
            name = path.relative_to(root).as_posix()
            if only not in name or not (mutants := mutants_of(path, name)):
                continue
            usable: list[Choice] = []
            for mutant in mutants:
                tests = covered.tests(name, mutant.line)
                if tests:
                    order = sorted(tests, key=lambda test: (times.get(test, 1.0), test))
                    usable.append(Choice(area, mutant, tuple(order)))
                if len(usable) == count:
                    break
            files.append(usable)
            usable_of[name] = bool(usable)
        files = [usable for usable in files if usable]
        files.sort(key=lambda usable: usable[0].mutant.key)  # files take turns, by chance and always alike
        turns = [usable[turn] for turn in range(count) for usable in files if turn < len(usable)]
        chosen += turns[:count]
    got = {choice.mutant.path.relative_to(root).as_posix() for choice in chosen}
    unseen = [name for name, usable in usable_of.items() if not usable]
    return Chosen(chosen, unseen, [name for name, usable in usable_of.items() if usable and name not in got])


def durations(junit_file: Path) -> dict[str, float]:
    """Seconds of each test by node id, as far as the report lets it be told: `tests/m3/test_m3.py::test_x[case]`."""
    times: dict[str, float] = {}
    for case in xml.parse(junit_file).iter("testcase"):
        module = case.get("classname", "").replace(".", "/")
        times[f"{module}.py::{case.get('name')}"] = float(case.get("time") or 0)
    return times


class Contexts:
    """Which tests execute a line. What a compiler takes (Numba) no tracer sees: there, the tests that execute its
    file's other lines or a module that imports it, also by way of other compiled files."""

    def __init__(self, root: Path, coverage_file: Path) -> None:
        self._data = CoverageData(str(coverage_file))
        self._data.read()
        self._files = {name: path for path in self._data.measured_files() if (name := _below(root, Path(path)))}
        self._imports = {name: _imported(root / name) for name in self._files if (root / name).exists()}
        self._lines: dict[str, dict[int, set[str]]] = {}

    def tests(self, name: str, line: int) -> set[str]:
        if tests := self._of(name).get(line):
            return tests
        return self._of_file(name) if self._is_compiled(name) else set()

    def _of_file(self, name: str) -> set[str]:
        """Of a compiled file: with its importers, and theirs where they are compiled too."""
        todo, seen = [name], {name}
        while todo:
            current = todo.pop()
            if not self._is_compiled(current):
                continue
            module = current.removesuffix(".py").replace("/", ".")
            users = {user for user, modules in self._imports.items() if module in modules} - seen
            seen |= users
            todo += users
        return {test for one in seen for tests in self._of(one).values() for test in tests}

    def _is_compiled(self, name: str) -> bool:
        return COMPILED.search(_text(self._files.get(name))) is not None

    def _of(self, name: str) -> dict[int, set[str]]:
        if name not in self._lines:
            path = self._files.get(name)
            found = self._data.contexts_by_lineno(path) if path else {}
            self._lines[name] = {
                line: {context.partition("|")[0] for context in contexts if context.endswith("|run")}
                for line, contexts in found.items()
            }
        return self._lines[name]


def _below(root: Path, path: Path) -> str | None:
    """The name under the root, also of a run that lay elsewhere."""
    for part in range(1, len(path.parts)):
        name = Path(*path.parts[part:])
        if (root / name).exists() and name.parts[0] in ("common", "stages", "benchmarks"):
            return name.as_posix()
    return None


def _text(path: str | None) -> str:
    return Path(path).read_text(encoding="utf-8") if path and Path(path).exists() else ""


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
