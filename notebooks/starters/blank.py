"""A lesson file with chosen bodies taken out; the rest is kept as it is, comments too."""

import ast
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Blank:
    """What to take out of a file.

    at: the way to a body, as in `Cache.grow` or `attend > for j`: a function, then beginnings of loops and conditions.
    start: of the first statement to take out (without it: all but a docstring); count: how many (0: all that follow).
    todo: what is to be written there.
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
    gone = {blank: _statements(source, blank) for blank in blanks}
    for blank, statements in sorted(gone.items(), key=lambda item: -item[1][0].lineno):
        indent = " " * statements[0].col_offset
        comment = textwrap.wrap(f"YOURS: {blank.todo}", 118 - len(indent))
        new = [*(f"{indent}# {line}" for line in comment), f'{indent}raise NotImplementedError("{blank.function}")']
        lines[statements[0].lineno - 1 : statements[-1].end_lineno] = new
    return "\n".join(lines) + "\n"


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods by names such as `BlockPool.take`."""
    scopes = [("", tree), *((f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    return {prefix + f.name: f for prefix, scope in scopes for f in scope.body if isinstance(f, ast.FunctionDef)}


def names(tree: ast.Module) -> list[str]:
    """Classes and constants of a module."""
    constants = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)] + constants


def unwritten(tree: ast.Module) -> list[str]:
    """Functions in which a `raise NotImplementedError` still is."""
    raises = {name: [n for n in ast.walk(f) if isinstance(n, ast.Raise)] for name, f in functions(tree).items()}
    return [name for name, nodes in raises.items() if any("NotImplementedError" in ast.dump(node) for node in nodes)]


def _statements(source: str, blank: Blank) -> list[ast.stmt]:
    name, *inner = blank.at.split(" > ")
    function = functions(ast.parse(source))[name]
    body = function.body
    for begins in inner:
        body = getattr(_from(source, body, begins)[0], "body")  # noqa: B009  (of a loop or a condition)
    if blank.start:
        body = _from(source, body, blank.start)
    elif not inner and ast.get_docstring(function):
        body = body[1:]
    return body[: blank.count] if blank.count else body


def _from(source: str, body: list[ast.stmt], begins: str) -> list[ast.stmt]:
    """The statements from the one that begins like this."""
    for i, statement in enumerate(body):
        if (ast.get_source_segment(source, statement) or "").startswith(begins):
            return body[i:]
    raise LookupError(f"no statement begins with {begins!r}")
