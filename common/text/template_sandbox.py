"""Limits for chat templates: each is a program from a model's folder, and could loop for ever or fill the memory.

Counted is what a template makes: the size of each value, of all that it holds, and the thread's CPU time; the limits
grow with the messages. What multiplies (`*`, `**`, widths) is estimated before it is computed. Lists and dictionaries
count as if printed, so that `[x, x]` in a loop is not free.
"""

import contextvars
import functools
import math
import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.compiler import CodeGenerator, operators
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE, MAX_CODE = 1 << 16, 1 << 19  # characters of a template, and of the Python that jinja2 makes of it
MAX_DEPTH = 100
MAX_BITS = 4096  # of a whole number: no chat needs more, and so no operation on numbers takes long
SECONDS = 0.3  # of CPU time, next to what the messages add
LONG = 1024  # bytes
UNUSED_REFS = 3  # to a text that is in a list, in a variable, and the argument of getrefcount
CONTAINER = 256  # bytes, besides what is in it
COUNTED = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Concat)  # and slices: the sandbox has no hook for them
# Filters and methods whose result, or whose search, can be as long as the product of subject and arguments
MULTIPLYING = frozenset(
    ["*", "batch", "center", "expandtabs", "indent", "join", "ljust", "lstrip", "replace", "rfind", "rindex", "rjust",
     "round", "rpartition", "rsplit", "rstrip", "slice", "strip", "tojson", "translate", "trim", "truncate", "zfill"]
)  # fmt: skip
QUADRATIC = frozenset(["pprint", "striptags", "urlize", "wordwrap"])
BLOCKED = frozenset(["encode", "decode", "to_bytes"])  # bytes have no use in a prompt, and some codecs are slow
FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")  # a width of four digits, or one that comes from the values
WIDTHS = {"%": re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)"), "format": FORMAT, "format_map": FORMAT}


class TooMuch(Exception):
    """The template asks for more than one rendering may take."""


class Budget:
    """Of one rendering, in bytes, and in seconds of its thread."""

    def __init__(self, messages: Iterable[Any], inputs: object) -> None:
        self._known: dict[int, tuple[object, int, int]] = {}  # by id: what keeps it alive, its size, its depth
        self._texts: dict[int, str] = {}  # long ones, by id
        self._held = 0  # bytes of them
        self._until = math.inf
        count, size = len(list(messages)), self._measure([messages, inputs])[0]
        self._largest, self._longest = (1 << 17) + 8 * size, (1 << 24) + 32 * size  # measured; estimated
        self._room, self._left = (1 << 24) + 8 * size, (1 << 24) + 32 * size  # for long texts; for all else
        self._until = time.thread_time() + SECONDS + 5e-7 * size + 2e-4 * count

    def tick(self, value: Any = True) -> Any:
        if time.thread_time() > self._until:
            raise TooMuch("it runs for too long")
        return value

    def expect(self, size: float, most: int | None = None) -> None:
        if size > (self._largest if most is None else most):
            raise TooMuch("it makes too much text, or too large a value")

    def afford(self, value: Any) -> Any:
        """The value, if it is not too much."""
        self.tick()
        if isinstance(value, int):
            self.expect(value.bit_length(), MAX_BITS)
        size, depth = self._measure(value)
        self.expect(size)
        self.expect(depth, MAX_DEPTH)
        if isinstance(value, str) and size > LONG:
            self._hold(value, size)
        else:
            scalar = value is None or isinstance(value, int | float | str)
            self._left -= size if isinstance(value, range) else sys.getsizeof(value, 64) + CONTAINER * (not scalar)
            self.expect(0, self._left)
        return value

    def _hold(self, text: str, size: int) -> None:
        """Long texts count as long as the template has them: one may well grow with each message."""
        self._held += size * (id(text) not in self._texts)
        self._texts[id(text)] = text
        if self._held > self._room:
            texts = list(self._texts.values())
            self._texts.clear()
            self._texts = {id(text): text for text in texts if sys.getrefcount(text) > UNUSED_REFS}
            self._held = sum(map(sys.getsizeof, self._texts.values()))
            self.expect(self._held, self._room)

    def call(self, name: str, subject: Any, others: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """The result of a filter, a method or an operator. A lazy one is counted as it is read."""
        length = 64 if isinstance(subject, int) else self._length(subject)
        if name in MULTIPLYING or name in QUADRATIC:
            self.expect(length * sum(map(self._length, others), length * (name in QUADRATIC)), self._longest)
        if name in WIDTHS and isinstance(subject, str):
            used = (subject.count("%") + subject.count("{")) * self._measure(others)[0]
            self.expect(math.inf if WIDTHS[name].search(subject) else used, self._longest)
        result = run()
        if isinstance(result, Iterator):
            depth = 1 + max(self._measure(value)[1] for value in (subject, *others))
            result = (self.afford(item) for item in result)  # pyright: ignore[reportUnknownVariableType]
            self._known[id(result)] = result, CONTAINER + length + sum(map(self._length, others)), depth
        return self.afford(result)

    def _length(self, value: Any) -> int:
        if isinstance(value, str):
            return len(value) + 1
        return abs(value) + 1 if isinstance(value, int) else self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Bytes as if nothing in it were shared, and how deep it is nested. No template can change what it holds."""
        if isinstance(value, str):
            return sys.getsizeof(value), 0
        if id(value) in self._known:
            return self._known[id(value)][1:]
        if isinstance(value, range):
            return CONTAINER + len(value), 1
        if not isinstance(value, list | tuple | set | Mapping | ItemsView | KeysView | ValuesView):
            return max(sys.getsizeof(value, 64), 32), 0
        self.tick()
        parts = [self._measure(item) for item in (value.items() if isinstance(value, Mapping) else value)]  # pyright: ignore
        size, depth = CONTAINER + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
        self._known[id(value)] = value, size, depth  # pyright: ignore[reportUnknownArgumentType]
        return size, depth


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def run_bounded(render: Callable[[], Any], messages: Iterable[Any], inputs: object) -> Any:
    """`render()`; all bounded templates in it share one budget, in proportion to what they are given."""
    context = contextvars.copy_context()
    context.run(_budget.set, Budget(messages, inputs))
    return context.run(render)


def bounded(environment: Environment) -> Environment:
    """The same environment with limits, in which nothing is computed while a template compiles."""
    result = environment.overlay(optimized=False)
    result.__class__ = BoundedEnvironment
    result.finalize = _printed
    result.filters = {name: _bounded_filter(name, function) for name, function in environment.filters.items()}
    result.tests = {name: _timed(function) for name, function in environment.tests.items()}
    quiet = type("Namespace", (environment.globals["namespace"],), {"__repr__": lambda _: "<Namespace>"})  # pyright: ignore
    result.globals = {**environment.globals, "namespace": quiet}
    result.globals.pop("lipsum", None)  # random text of any length
    return result


class BoundedCode(CodeGenerator):
    def visit(self, node: Any, *args: Any, **kwargs: Any) -> None:
        """With a look at the clock in front of each statement, and at each step of what takes its operands' length."""
        _budget.get().tick()
        if isinstance(node, nodes.Const) and isinstance(node.value, float) and not math.isfinite(node.value):
            raise TooMuch("it has too large a number")
        if isinstance(node, nodes.Stmt):
            self.writeline("environment.tick()")
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None), node.test)
        if isinstance(node, nodes.Concat) and len(node.nodes) > 2:  # two at a time
            node = nodes.Concat([nodes.Concat(node.nodes[:-1], lineno=node.lineno), node.nodes[-1]], lineno=node.lineno)
        counted = isinstance(node, COUNTED) and getattr(node, "ctx", "load") == "load"
        counted |= isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        timed = isinstance(node, nodes.Compare | nodes.Test | nodes.Getitem) and getattr(node, "ctx", "load") == "load"
        self.write("environment.afford(" if counted else "environment.tick(" * timed)
        super().visit(node, *args, **kwargs)
        self.write(")" * (counted or timed))

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.write(f" {operators[node.op]} environment.tick(")
        self.visit(node.expr, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = BoundedCode
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    intercepted_unops = frozenset(ImmutableSandboxedEnvironment.default_unop_table)
    tick = staticmethod(lambda value=True: _budget.get().tick(value))  # pyright: ignore[reportUnknownLambdaType]
    afford = staticmethod(lambda value: _budget.get().afford(value))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        parts = list(parts)
        _budget.get().expect(sum(map(len, parts)))
        return _budget.get().afford("".join(parts))

    def _compile(self, source: str, filename: str) -> Any:
        _budget.get().expect(len(source), MAX_CODE)
        return super()._compile(source, filename)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in BLOCKED and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format comes wrapped
        named = (value for key, value in kwargs.items() if not key.startswith("_"))  # but _loop_vars, and _block_vars
        run = functools.partial(super().call, __context, __obj, *args, **kwargs)
        return _budget.get().call(getattr(__obj, "__name__", ""), subject, (*args, *named), run)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _budget.get().expect((abs(left).bit_length() - 1) * right, MAX_BITS)
        subject, other = (right, left) if isinstance(left, int) else (left, right)
        run = functools.partial(self.binop_table[operator], left, right)
        return _budget.get().call("" if numbers else operator, subject, (other,), run)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        return _budget.get().afford(super().call_unop(context, operator, arg))


@pass_context  # so that no constant is printed while a template compiles
def _printed(_: Context, value: Any) -> Any:
    return value if isinstance(value, str) else _budget.get().afford(str(value))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = int(hasattr(function, "jinja_pass_arg"))  # the environment or the context comes first

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        run = functools.partial(function, *args, **kwargs)
        others = *args[skipped + 1 :], *kwargs.values()
        return _budget.get().call("%" if name == "format" else name, args[skipped], others, run)

    return limited


def _timed(test: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(test)(lambda *args, **kwargs: _budget.get().tick(test(*args, **kwargs)))  # pyright: ignore
