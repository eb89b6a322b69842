"""The rules that keep two neighbouring stages one idea apart, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import stages
from common.cli.diff import lessons

ROOT = Path(__file__).parent.parent
STAGES = ROOT / "stages"
FIXED = {"__init__.py", "__main__.py", "engine.py", "README.md"}
SERVER_LIBRARIES = {"fastapi", "uvicorn", "starlette", "prometheus_client", "aiohttp", "flask"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(source: str, types: bool = True) -> Iterator[str]:
    """Full names of what a module imports, wherever the import stands: `stages.m0_baseline.batch.pad_batch`.

    types: those under `if TYPE_CHECKING` too.
    """
    tree = ast.parse(source)
    checking = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = set() if types else {below for node in checking for part in node.body for below in ast.walk(part)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stage_number(name: str) -> int | None:
    """3 for `stages.m3_paged_kv.attention`; None for what is no module of a stage."""
    parts = name.split(".")
    if parts[0] == "stages" and len(parts) > 1 and parts[1][:1] == "m" and parts[1][1:2].isdigit():
        return int(parts[1][1])
    return None


def forward_imports(source: str, own: int) -> list[str]:
    return [name for name in imports(source) if (number := stage_number(name)) is not None and number > own]


def stage_bases(source: str, own: int) -> list[str]:
    """Classes whose base comes from another stage, whatever it is called here."""
    tree = ast.parse(source)
    local: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            local.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            local.update(
                {
                    alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                    for alias in node.names
                }
            )
    found: list[str] = []
    for node in ast.walk(tree):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            first, _, rest = ast.unparse(base).partition("[")[0].partition(".")
            number = stage_number(".".join(filter(None, (local.get(first, first), rest))))
            if number is not None and number != own:
                found.append(f"class {node.name}({ast.unparse(base)})" if isinstance(node, ast.ClassDef) else "")
    return found


@pytest.mark.parametrize("stage", stages.names())
def test_stage_imports_point_backwards_and_no_class_inherits_from_another_stage(stage: str) -> None:
    own = int(stage[1])
    for path in modules(STAGES / stage):
        source = path.read_text()
        assert forward_imports(source, own) == [], path
        assert stage_bases(source, own) == [], path


@pytest.mark.parametrize("stage", stages.names())
def test_the_command_line_of_a_stage_builds_that_stage(stage: str) -> None:
    """A copied `__main__.py` that still names the stage before runs, and shows the wrong engine."""
    source = (STAGES / stage / "__main__.py").read_text()
    assert f"stages.{stage}.engine.build" in imports(source)
    assert f"python -m stages.{stage} " in source


@pytest.mark.parametrize("stage", stages.names())
def test_stage_folder_holds_nothing_beside_its_parts(stage: str) -> None:
    """Modules, packages of modules where one idea has many implementations (m4's backends and kernels), and the texts
    that m7 calibrates and measures on."""
    names = {path.name for path in (STAGES / stage).iterdir() if path.name != "__pycache__"}
    assert names >= FIXED
    files = [path for path in (STAGES / stage).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.name for path in files if path.suffix != ".py" and path.parent.name != "data"} == {"README.md"}


@pytest.mark.parametrize("stage", stages.names())
def test_no_module_of_a_stage_is_a_copy_of_the_one_it_replaces(stage: str) -> None:
    for lesson in lessons(STAGES / stage):
        if lesson.replaces is not None:
            assert ast.dump(ast.parse(lesson.path.read_text())) != ast.dump(ast.parse(lesson.replaces.read_text()))


def test_common_imports_no_stage_and_no_harness() -> None:
    for path in modules(ROOT / "common"):
        wrong = [name for name in imports(path.read_text()) if name.split(".")[0] in ("stages", "benchmarks", "tests")]
        assert wrong == [], path


def test_engines_import_no_server_library() -> None:
    paths = [p for p in modules(ROOT / "common") if p.parent.name not in ("serving", "arena", "scale")] + modules(
        STAGES
    )
    for path in paths:
        assert SERVER_LIBRARIES.isdisjoint(name.split(".")[0] for name in imports(path.read_text())), path


def test_the_rules_see_what_they_forbid() -> None:
    assert forward_imports("def f():\n    from stages.m6_x.pool import Pool", own=5) == ["stages.m6_x.pool.Pool"]
    assert forward_imports("from stages.m3_x.pool import Pool", own=5) == []
    assert stage_bases("from stages.m3_x.pool import Pool as P\nclass Mine(P[int]): ...", own=5) == [
        "class Mine(P[int])"
    ]
    assert stage_bases("import stages.m3_x.pool\nclass Mine(stages.m3_x.pool.Pool): ...", own=5) != []
    assert stage_bases("from stages.m5_x.pool import Pool\nclass Mine(Pool): ...", own=5) == []
    assert stage_bases("from common.scheduler import Scheduler\nclass Mine(Scheduler): ...", own=5) == []
