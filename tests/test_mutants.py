"""Which faults `python -m tests.mutants` makes, and which tests it runs for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.choose import choose

coverage = pytest.importorskip("coverage")

KERNELS = "common/execution/cpu"
FILES = {
    "simd.py": "@intrinsic\ndef load(x):\n    return x + 1\n",
    "cpu_sum.py": f"from {KERNELS.replace('/', '.')} import simd\n@compiled()\ndef add(x, y):\n    return x + y\n",
    "layer.py": "def run(x):\n    from common.execution.cpu import cpu_sum\n    return cpu_sum.add(x, x)\n",
    "unseen.py": "def never(x):\n    return x + 1\n",
    "far.py": "from common.execution.cpu import layer\ndef use(x):\n    return layer.run(x) + 1\n",
}


def test_what_numba_compiles_has_the_tests_of_its_importers(tmp_path: Path) -> None:
    folder = tmp_path / KERNELS
    folder.mkdir(parents=True)
    data = coverage.CoverageData(str(tmp_path / "coverage"))
    for name, source in FILES.items():
        (folder / name).write_text(source)
        data.add_lines({str(folder / name): [1]})  # as it is imported, by no test
    data.set_context("tests/test_it.py::test_slow|run")
    data.add_lines({str(folder / "layer.py"): [2, 3]})
    data.set_context("tests/test_it.py::test_fast|run")
    data.add_lines({str(folder / "layer.py"): [2]})
    data.set_context("tests/test_it.py::test_far|run")
    data.add_lines({str(folder / "far.py"): [3]})
    data.write()
    cases = "".join(
        f'<testcase classname="tests.test_it" name="{name}" time="{seconds}"/>'
        for name, seconds in {"test_slow": 9, "test_fast": 0.1, "test_far": 1}.items()
    )
    (tmp_path / "junit.xml").write_text(f"<testsuite>{cases}</testsuite>")

    chosen = choose(tmp_path, tmp_path / "coverage", tmp_path / "junit.xml", 9)
    tests = {choice.mutant.path.name: choice.tests for choice in chosen.choices}
    both = ("tests/test_it.py::test_fast", "tests/test_it.py::test_slow")
    assert tests == {"simd.py": both, "cpu_sum.py": both, "far.py": ("tests/test_it.py::test_far",)}
    assert chosen.unseen == [f"{KERNELS}/unseen.py"]
    assert chosen.no_turn == []

    one = choose(tmp_path, tmp_path / "coverage", tmp_path / "junit.xml", 1)
    assert len(one.choices) == 1 and len(one.no_turn) == 2
    only = choose(tmp_path, tmp_path / "coverage", tmp_path / "junit.xml", 1, "cpu_sum")
    assert [choice.mutant.path.name for choice in only.choices] == ["cpu_sum.py"]
    assert only.unseen == only.no_turn == []
