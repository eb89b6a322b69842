"""Placeholders in texts, filled from the results and from the source.

{figure:mixed.m2.ttft_s.p50|s}  {figure:h200:...}     a figure (`benchmarks.report.figures`), of a named machine
{compute:4096 * qwen.kv / 450e9|s}                    arithmetic with shapes and figures (`report.arithmetic`)
{code:common/engine.py:Engine.step}                   a link to the line that defines it
{link:README.md#the-stages|text}  {machine:own}       a link to a file; what a machine is
"""

import ast
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report.arithmetic import FIGURE, compute
from benchmarks.report.figures import command_for, evaluate, show
from benchmarks.report.peers import MODEL
from benchmarks.report.sources import Machine
from common.errors import require

PLACEHOLDER = re.compile(r"\{(figure|compute|code|link|machine):([^{}|]+)(?:\|([^{}]+))?\}")
MACHINE = re.compile(r"^([a-z0-9_]+): ?(?=\S)")
BORROWED = "†"  # marks a figure from the kept results, which the reader's own lack
MISSING = {"en": "*not measured yet: run `{}`*", "zh": "*尚未测量：运行 `{}`*"}


@cache
def _symbols(path: Path) -> Mapping[str, int]:
    """Line of every class, function, method and module constant, by its dotted name."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    scopes = [("", body), *((f"{node.name}.", node.body) for node in body if isinstance(node, ast.ClassDef))]
    found: dict[str, int] = {}
    for prefix, nodes in scopes:
        for node in nodes:
            for named in getattr(node, "targets", [getattr(node, "target", node)]):
                found.setdefault(f"{prefix}{getattr(named, 'id', getattr(named, 'name', None))}", node.lineno)
    return found


def line_of(path: str, symbol: str) -> int:
    """Where a symbol of a file of this repository is defined, from 1; `UserError` if it is not."""
    require((ROOT / path).is_file(), f"{path} does not exist: correct the placeholder {{code:{path}:{symbol}}}")
    lines = _symbols(ROOT / path)
    require(symbol in lines, f"{path} defines no {symbol}: correct the placeholder {{code:{path}:{symbol}}}")
    return lines[symbol]


@dataclass(frozen=True)
class Filler:
    """`own`: the machine of a placeholder that names none; where it lacks a figure, that of `fallback` takes its place,
    with a mark. `folder`: where the text will lie. `missing`: written for a figure that no machine has, instead of the
    command that measures it."""

    machines: Mapping[str, Machine]
    own: str
    folder: Path
    language: str = "en"
    fallback: str | None = None
    missing: str | None = None

    def fill(self, text: str) -> str:
        return PLACEHOLDER.sub(self._one, text)

    def _one(self, match: re.Match[str]) -> str:
        kind, what, extra = match.groups()
        if kind in ("figure", "compute"):
            return self._figure(what, extra or "rate", evaluate if kind == "figure" else compute)
        if kind == "machine":
            found = self.machines.get(self.own if what == "own" else what)
            return found.title if found else what
        return self._code(what, extra) if kind == "code" else self._link(what, extra)

    def _figure(self, what: str, form: str, evaluate: Callable[[Machine, str], float | None]) -> str:
        named = MACHINE.match(what)
        name, expression = (named[1], what[named.end() :]) if named else (self.own, what)
        for place in (name,) if named else (name, self.fallback):
            machine = self.machines.get(place or "")
            value = None if machine is None else evaluate(machine, expression)
            if value is not None:
                return show(value, form) + (BORROWED if place != name else "")
        if self.missing is not None:
            return self.missing
        expression = expression if evaluate is not compute else (FIGURE.findall(expression) or ["attention"])[0]
        machine = self.machines.get(name)
        gpu, model = (machine.is_gpu, machine.model) if machine else (True, MODEL)
        return MISSING[self.language].format(command_for(expression, gpu, model))

    def _code(self, what: str, label: str | None) -> str:
        path, _, symbol = what.partition(":")
        anchor = f"#L{line_of(path, symbol)}" if symbol else ""
        return f"[`{label or symbol or path}`]({self._target(path)}{anchor})"

    def _link(self, what: str, label: str | None) -> str:
        path, hash_sign, heading = what.partition("#")
        return f"[{label or what}]({self._target(path)}{hash_sign}{heading})"  # tests/test_docs.py follows it

    def _target(self, path: str) -> str:
        return os.path.relpath(ROOT / path, self.folder).replace(os.sep, "/")
