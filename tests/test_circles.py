"""Between files there is no circle of imports, so that each can be read after what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_imports import ROOT, imports, modules

Graph = dict[str, set[str]]

FORBIDDEN = [
    ("stages", "benchmarks"),
    ("common", "stages"),
    ("common", "benchmarks"),
    ("common.serving", "common.cli"),
    ("common.serving", "common.arena"),
    ("common.arena", "common.cli"),
]


def graph(root: Path, types: bool = True) -> Graph:
    """Of each module of `common`, `stages` and `benchmarks` those that it imports, at its top or inside a function.

    A package counts where something is taken from its `__init__.py`, not where a module in it is.
    types: with what is imported for annotations alone, under `if TYPE_CHECKING`.
    """
    files = {_module(p.relative_to(root)): p for top in ("common", "stages", "benchmarks") for p in modules(root / top)}
    found: Graph = {}
    for module, path in files.items():
        names = imports(path.read_text(encoding="utf-8"), types)
        found[module] = {known for name in names if (known := _longest(name, files)) is not None}
    return found


def _module(path: Path) -> str:
    """`common/models/__init__.py` is `common.models`."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _longest(name: str, files: Mapping[str, Path]) -> str | None:
    """`common.plan.Chunk` is the module `common.plan`."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def circle(found: Graph) -> list[str]:
    """One of the circles, as `[a, b, a]`; empty: there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def crossing(found: Graph, source: str, target: str) -> list[str]:
    """What the modules in `source` import from `target`."""
    return [
        f"{module} -> {other}"
        for module, others in sorted(found.items())
        for other in sorted(others)
        if f"{module}.".startswith(f"{source}.") and f"{other}.".startswith(f"{target}.")
    ]


@pytest.mark.parametrize("types", [False, True], ids=["at_run_time", "with_annotations"])
def test_no_circle_between_files(types: bool) -> None:
    assert circle(graph(ROOT, types)) == []


@pytest.mark.parametrize(("source", "target"), FORBIDDEN)
def test_imports_point_one_way(source: str, target: str) -> None:
    assert crossing(graph(ROOT), source, target) == []


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    for name, text in {
        "common/__init__.py": "from common.a import x\n",
        "common/a.py": "def f():\n    from common import b\n",
        "common/b.py": "from common.c.d import y\n",
        "common/c/__init__.py": "",
        "common/c/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import common.a\n",
        "stages/m1.py": "import benchmarks.run\nimport os\n",
        "benchmarks/run.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert graph(tmp_path)["common.a"] == {"common.b"} and graph(tmp_path)["stages.m1"] == {"benchmarks.run"}
    assert circle(graph(tmp_path, types=False)) == []
    assert set(circle(graph(tmp_path))) == {"common.a", "common.b", "common.c.d"}
    assert crossing(graph(tmp_path), "stages", "benchmarks") == ["stages.m1 -> benchmarks.run"]
    assert crossing(graph(tmp_path), "common.c", "common.b") == []
