"""Small faults, made from the syntax tree: one changed operator, number or statement each."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARE = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
}
SWAPPED_CALLS = {"min": "max", "max": "min", "all": "any", "any": "all"}


@dataclass(frozen=True)
class Mutant:
    """`source` is the whole file with the fault; `line` is where it stands."""

    path: Path
    line: int
    what: str
    source: str
    key: str
    """Orders the mutants of a file by chance, and the same way while the line's text is the same."""


def mutants_of(path: Path, name: str) -> list[Mutant]:
    """All mutants of a file, in the order of their keys. name: of the file, for the keys."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data, found, seen = text.encode(), dict[str, Mutant](), dict[str, int]()
    for node, first, end, old, new in _changes(ast.parse(text), data, starts):
        number = node.lineno
        mutated = (data[:first] + new.encode() + data[end:]).decode()
        same = f"{name} {lines[number - 1].strip()} {old} {new}"
        seen[same] = seen.get(same, 0) + 1
        key = hashlib.sha256(f"{same} {seen[same]}".encode()).hexdigest()
        what = f"{lines[number - 1].strip()}   [{old} -> {new}]"
        found[mutated] = Mutant(path, number, what, mutated, key)
    return sorted(found.values(), key=lambda mutant: mutant.key)


def _changes(
    tree: ast.Module, data: bytes, starts: list[int]
) -> Iterator[tuple[ast.expr | ast.stmt, int, int, str, str]]:
    """(node, first byte, byte after the last, old text, new text)."""

    def begin(node: ast.expr | ast.stmt) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr, right: ast.expr, old: str) -> tuple[int, int] | None:
        at = data.find(old.encode(), end(left), begin(right))
        return None if at < 0 else (at, at + len(old))

    for node in _code(tree):
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                old, new = COMPARE[type(operator)]
                if where := between(left, right, old):
                    yield node, *where, old, new
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            text = isinstance(node.left, ast.Constant | ast.JoinedStr) and not _is_number(node.left)
            if not text and (where := between(node.left, node.right, old)):
                yield node, *where, old, new
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            if where := between(node.values[0], node.values[1], old):
                yield node, *where, old, new
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, begin(node), begin(node.operand), "not", ""
        elif isinstance(node, ast.Constant) and _is_number(node) and isinstance(node.value, int):
            yield node, begin(node), end(node), str(node.value), str(node.value + 1)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED_CALLS:
            yield node, begin(node.func), end(node.func), node.func.id, SWAPPED_CALLS[node.func.id]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, begin(node), end(node), "call", "pass"
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            if where := between(node.target, node.value, f"{old}="):  # type: ignore[arg-type]
                yield node, *where, f"{old}=", f"{new}="


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _code(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Nodes inside of functions that decide something: no annotations, messages of errors, decorators or defaults."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    if isinstance(node, ast.Raise | ast.Assert | ast.FunctionDef | ast.AsyncFunctionDef | ast.JoinedStr | ast.Import):
        return  # functions inside are found by themselves
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _inside(child)
