"""A lesson file with chosen bodies taken out; what is left is kept as it is, comments too."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

Function = ast.FunctionDef


@dataclass(frozen=True)
class Blank:
    """What to take out of a file.

    at: the way to a body, as in `Cache.grow` or `attend > for j`: names of classes and functions, then beginnings of
    statements. start: of the first statement to take out (without it: all but a docstring); count: how many (0: all
    that follow). todo: what is to be written there, in a sentence or two.
    """

    file: str
    at: str
    todo: str
    start: str = ""
    count: int = 0

    @property
    def function(self) -> str:
        return self.at.split(" > ")[0]


def starter(source: str, blanks: Sequence[Blank]) -> str:
    """The source, with comments and a `raise NotImplementedError` in the place of each blank."""
    lines = source.splitlines()
    tree = ast.parse(source)
    for blank in sorted(blanks, key=lambda b: -_statements(source, tree, b)[0].lineno):
        gone = _statements(source, tree, blank)
        indent = " " * gone[0].col_offset
        comment = textwrap.wrap(f"YOURS: {blank.todo}", 118 - len(indent))
        new = [*(f"{indent}# {line}" for line in comment), f'{indent}raise NotImplementedError("{blank.function}")']
        lines[gone[0].lineno - 1 : gone[-1].end_lineno] = new
    return "\n".join(lines) + "\n"


def functions(tree: ast.Module) -> dict[str, Function]:
    """Functions and methods by names such as `BlockPool.take`."""
    found: dict[str, Function] = {}
    for node in tree.body:
        if isinstance(node, Function):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, Function)}
    return found


def names(tree: ast.Module) -> list[str]:
    """What a module defines at its top level."""
    defined = (n for n in tree.body if isinstance(n, Function | ast.ClassDef))
    targets = (target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets)
    return [n.name for n in defined] + [target.id for target in targets if isinstance(target, ast.Name)]


def unwritten(tree: ast.Module) -> list[str]:
    """Functions in which a `raise NotImplementedError` still is."""
    raises = {name: [n for n in ast.walk(f) if isinstance(n, ast.Raise)] for name, f in functions(tree).items()}
    return [name for name, nodes in raises.items() if any("NotImplementedError" in ast.dump(node) for node in nodes)]


def _statements(source: str, tree: ast.Module, blank: Blank) -> list[ast.stmt]:
    name, *inner = blank.at.split(" > ")
    body = functions(tree)[name].body
    for begins in inner:
        body = _from(source, body, begins)[0].body  # pyright: ignore[reportAttributeAccessIssue]
    if blank.start:
        body = _from(source, body, blank.start)
    elif isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):  # the docstring
        body = body[1:]
    return body[: blank.count] if blank.count else body


def _from(source: str, body: list[ast.stmt], begins: str) -> list[ast.stmt]:
    """The statements from the one that begins like this."""
    for i, statement in enumerate(body):
        if (ast.get_source_segment(source, statement) or "").startswith(begins):
            return body[i:]
    raise LookupError(f"no statement begins with {begins!r}")
