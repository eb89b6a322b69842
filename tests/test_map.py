"""The map of `common` (its README) against the files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_imports import ROOT, imports, modules

COMMON = ROOT / "common"
KERNELS = ("common.execution.gpu", "common.execution.cpu", "triton", "numba")
FUSED = ("common.execution.gpu.fused", "common.execution.cpu.fused_cpu")
FILES = sorted(path.name for path in COMMON.glob("*.py") if path.name != "__init__.py")


def rows(heading: str) -> list[str]:
    """What the first column of the table under a heading links, in order."""
    text = (COMMON / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    return re.findall(r"^\| \[[^\]]*\]\(([^)]+)\)", section, flags=re.M)


def within(names: tuple[str, ...], source: str) -> list[str]:
    """What a module imports of the modules `names` and what is in them."""
    return [found for found in imports(source) if any(f"{found}.".startswith(f"{name}.") for name in names)]


def test_the_map_names_every_file_of_the_root_once_and_no_other() -> None:
    assert sorted(rows("The files")) == FILES


def test_the_map_names_every_folder_once_and_no_other() -> None:
    assert sorted(rows("The folders")) == sorted(path.parent.name for path in COMMON.glob("*/__init__.py"))


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_root_imports_a_kernel(name: str) -> None:
    assert within(KERNELS, (COMMON / name).read_text(encoding="utf-8")) == []


def test_one_file_chooses_the_fused_kernels() -> None:
    """The engine, the stages and the model get them from there alone."""
    paths = [*modules(COMMON), *modules(ROOT / "stages")]
    found = [p.relative_to(ROOT) for p in paths if within(FUSED, p.read_text(encoding="utf-8"))]
    assert found == [Path("common/execution/choose.py")]


def test_the_definition_of_a_linear_layer_imports_no_compiled_one() -> None:
    assert within(("common.execution",), (COMMON / "models/linear.py").read_text(encoding="utf-8")) == []


def test_the_rules_see_what_they_forbid() -> None:
    assert within(KERNELS, "def f():\n    from common.execution.gpu import fused") == ["common.execution.gpu.fused"]
    assert within(KERNELS, "import triton") == ["triton"]
    assert within(KERNELS, "from common.execution.cpu_count import x\nimport triton_kernels") == []
