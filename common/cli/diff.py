"""`diff`: the lesson of a stage, file by file in reading order."""

import ast
import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.style import Style

COLOURS = {"+": "green", "-": "red", "@": "cyan"}
# Sub-folders that are not part of a stage's lesson, even where its README names a file in them.
NO_LESSONS = ("fast", "checkpoint", "kernels")
LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")
Line = tuple[str, str]  # A style of `rich`, and the text


@dataclass(frozen=True)
class Lesson:
    """A file of a stage to read, what it is about, and the earlier stage's file that it replaces (None: new)."""

    path: Path
    about: str
    replaces: Path | None


def reading_list(folder: Path) -> dict[str, str]:
    """The table under 'The code' in the stage's README, in its order: each file or folder that its first column links,
    also outside of the stage (`../../common/batch.py`), and the sentence next to it ('' in a row of several files)."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    section = re.search(r"^## The code\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    found: dict[str, str] = {}
    for row in re.findall(r"^\| *(.*?) *\|$", section[1] if section else "", flags=re.M):
        files, _, about = row.partition(" | ")
        targets = [target.rstrip("/") for _, target in LINK.findall(files)]
        found.update(dict.fromkeys(targets, LINK.sub(r"\1", about) if len(targets) == 1 else ""))
    return found


def lesson_modules(folder: Path) -> list[str]:
    """The modules in the root of a stage's folder, `engine.py` last. An `__init__.py` counts where it holds code."""
    names = [path.name for path in folder.glob("*.py") if path.name != "__main__.py" and _holds_code(path)]
    return sorted(names, key=lambda name: (name == "engine.py", name))


def lessons(folder: Path) -> list[Lesson]:
    """The files to read, in the order of the README's table; modules that it does not name come last.

    A file replaces the latest earlier one of its name, unless the stage still uses that one: then the two only share a
    name. `engine.py`, the wiring list, always replaces the one before, even where it takes a part of it.
    """
    listed = reading_list(folder)
    own = [name for name in listed if name.endswith(".py") and Path(name).parts[0] not in (*NO_LESSONS, "..")]
    names = dict.fromkeys([*(name for name in own if (folder / name).exists()), *lesson_modules(folder)])
    used = set(used_unchanged(folder))
    earlier = sorted((f for f in folder.parent.glob("m[0-9]_*") if f.name < folder.name), reverse=True)
    found: list[Lesson] = []
    for name in names:
        path = folder / name
        replaces = next((f / name for f in earlier if (f / name).exists() and _holds_code(f / name)), None)
        if replaces in used and name != "engine.py":
            replaces = None
        found.append(Lesson(path, listed.get(name) or first_sentence(path), replaces))
    return found


def first_sentence(path: Path) -> str:
    """Of a module's docstring."""
    text = " ".join((ast.get_docstring(_tree(path)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) ", text)[0]


def used_unchanged(folder: Path) -> list[Path]:
    """The modules of earlier stages that any module of the stage imports, at its top or inside a function."""
    found: set[Path] = set()
    for path in folder.rglob("*.py"):
        for name in _imports(_tree(path)):
            parts = name.split(".")
            if parts[0] == "stages" and len(parts) > 2 and re.match(r"m\d", parts[1]) and parts[1] < folder.name:
                module = _file_of(folder.parent, parts[1:])
                found.update([module] if module is not None else [])
    return sorted(found)


def lesson_lines(lesson: Lesson, root: Path) -> Iterator[Line]:
    """What the file is about; then the whole file, as a unified diff against what it replaces, or as it is."""
    name = str(lesson.path.relative_to(root))
    new = _lines(lesson.path)
    yield "bold", f"# {lesson.path.name}: {lesson.about}"
    if lesson.replaces is None:
        yield "bold", f"new: {name} ({len(new)} lines)"
        yield from (("none", line) for line in new)
        return
    old = _lines(lesson.replaces)
    names = (str(lesson.replaces.relative_to(root)), name)
    for number, line in enumerate(difflib.unified_diff(old, new, *names, n=len(old) + len(new), lineterm="")):
        yield "bold" if number < 2 else COLOURS.get(line[:1], "none"), line


def diff_lines(folder: Path) -> Iterator[Line]:
    """The lessons, then the names of other files and of the modules that are used unchanged."""
    root, shown = folder.parent.parent, lessons(folder)
    for lesson in shown:
        yield from lesson_lines(lesson, root)
        yield "none", ""
    listed, known = reading_list(folder), {lesson.path for lesson in shown}
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [p for p in sub.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p not in known]
        if not files:
            continue
        about = f": {listed[sub.name]}" if listed.get(sub.name) else ""
        count = sum(len(_lines(path)) for path in files)
        yield "bold", f"not shown: {sub.relative_to(root)}/ ({len(files)} files, {count} lines){about}"
    used = ", ".join(str(path.relative_to(root)) for path in used_unchanged(folder))
    yield "bold", f"used unchanged: {used or 'nothing of an earlier stage'}"


def show_diff(folder: Path) -> None:
    """Print them, coloured in a terminal."""
    coloured = sys.stdout.isatty()
    try:
        for style, text in diff_lines(folder):
            print(Style.parse(style).render(text) if coloured else text)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _holds_code(path: Path) -> bool:
    return path.name != "__init__.py" or any(not isinstance(node, ast.Expr) for node in _tree(path).body)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Full names: `stages.m0_baseline.batch.pad_batch`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(folder: Path, parts: list[str]) -> Path | None:
    """The file that holds what `parts` name: a module, or a package that holds code."""
    for length in range(len(parts), 0, -1):
        path = folder.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file if _holds_code(file) else None
    return None
